"""Data: from files, folders and hub ids to batches of token ids and labels. `load_data` is the way in."""

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from kdlm.data.arrays import SamplesSection
from kdlm.data.captions import CaptionsSection
from kdlm.data.collate import Collator, Prefetched, stacked
from kdlm.data.contexts import ContextCollator, ContextSection, Reprompt
from kdlm.data.image_collate import ImageTextCollator
from kdlm.data.image_files import ImageSource
from kdlm.data.image_text import ImageTextSection
from kdlm.data.images import ImagesSection, PointsSection
from kdlm.data.load import Data, collator_for, load_data
from kdlm.data.report import DataReport
from kdlm.data.sections import DataSection, Source
from kdlm.data.tensor_rows import TensorRows
from kdlm.data.text_classes import ClassCollator, TextClassesSection
from kdlm.data.two_readings import PairCollator


def _text_by_default(value: Any) -> Any:
    return {"name": "text", **value} if isinstance(value, dict) else value


AnyData = Annotated[
    Annotated[
        DataSection
        | TextClassesSection
        | ImageTextSection
        | ImagesSection
        | CaptionsSection
        | PointsSection
        | SamplesSection,
        Field(discriminator="name"),
    ],
    BeforeValidator(_text_by_default),
]
"""What a recipe trains on; a section without a `name` is text."""

__all__ = [
    "AnyData",
    "CaptionsSection",
    "ClassCollator",
    "Collator",
    "ContextCollator",
    "ContextSection",
    "Data",
    "DataReport",
    "DataSection",
    "ImageSource",
    "ImageTextCollator",
    "ImageTextSection",
    "ImagesSection",
    "PairCollator",
    "PointsSection",
    "Prefetched",
    "Reprompt",
    "SamplesSection",
    "Source",
    "TensorRows",
    "TextClassesSection",
    "collator_for",
    "load_data",
    "stacked",
]
