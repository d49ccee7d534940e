"""Writers: models that stay as they are and continue prompts in words."""

from typing import Annotated

from pydantic import Field

from kdlm.writers.local import LocalSection, LocalWriter
from kdlm.writers.openai import OpenAISection, OpenAIWriter
from kdlm.writers.scoring import Scored, Scorer
from kdlm.writers.vllm import VLLMWriter, VLLMWriterSection
from kdlm.writers.writer import Answered, Asked, Prices, Prompt, Refused, Text, Writer, WriterSection

AnyWriter = Annotated[OpenAISection | LocalSection | VLLMWriterSection, Field(discriminator="name")]
"""A model that writes, chosen by its `name`."""

__all__ = [
    "Answered",
    "AnyWriter",
    "Asked",
    "LocalSection",
    "LocalWriter",
    "OpenAISection",
    "OpenAIWriter",
    "Prices",
    "Prompt",
    "Refused",
    "Scored",
    "Scorer",
    "Text",
    "VLLMWriter",
    "VLLMWriterSection",
    "Writer",
    "WriterSection",
]
