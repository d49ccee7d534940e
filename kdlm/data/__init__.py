"""Data: from files, folders and hub ids to batches of token ids and labels. `load_data` is the way in."""

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from kdlm.data.collate import Collator, Prefetched, collator_for, stacked
from kdlm.data.image_collate import ImageTextCollator
from kdlm.data.image_text import ImageTextSection
from kdlm.data.images import ImagesSection, PointsSection, TensorRows
from kdlm.data.load import Data, load_data
from kdlm.data.report import DataReport
from kdlm.data.sections import DataSection, Source


def _text_by_default(value: Any) -> Any:
    return {"name": "text", **value} if isinstance(value, dict) else value


AnyData = Annotated[
    Annotated[DataSection | ImageTextSection | ImagesSection | PointsSection, Field(discriminator="name")],
    BeforeValidator(_text_by_default),
]
"""What a recipe trains on; a section without a `name` is text."""

__all__ = [
    "AnyData",
    "Collator",
    "Data",
    "DataReport",
    "DataSection",
    "ImageTextCollator",
    "ImageTextSection",
    "ImagesSection",
    "PointsSection",
    "Prefetched",
    "Source",
    "TensorRows",
    "collator_for",
    "load_data",
    "stacked",
]
