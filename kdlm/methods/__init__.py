"""Methods: what one training step computes. A new one is a file here, a line in the union, a recipe, a test."""

from typing import Annotated, Any, Literal

from pydantic import Field

from kdlm.methods.distillm2 import DistiLLM2, DistiLLM2Section
from kdlm.methods.hidden_kd import HiddenKD, HiddenKDSection
from kdlm.methods.logit_kd import LogitKD, LogitKDSection
from kdlm.methods.method import EmaOf, Method, Role, Step, Term, Terms, Trainable
from kdlm.methods.sequence_kd import SequenceKD, SequenceKDSection
from kdlm.methods.taid import Taid, TaidSection
from kdlm.methods.tokens import TokenMethod
from kdlm.methods.tsd_kd import TsdKD, TsdKDSection
from kdlm.section import Custom


class CustomMethod(Custom):
    """Your own method: `target` is a `kdlm.methods.Method` subclass, called with (losses, vocab=..., **args)."""

    name: Literal["custom"] = "custom"

    def build(self, losses: Any, vocab: Any) -> Method:
        return self.load()(losses, vocab=vocab, **self.args)


AnyMethod = Annotated[
    LogitKDSection | TaidSection | SequenceKDSection | HiddenKDSection | DistiLLM2Section | TsdKDSection | CustomMethod,
    Field(discriminator="name"),
]

__all__ = [
    "AnyMethod",
    "CustomMethod",
    "DistiLLM2",
    "DistiLLM2Section",
    "EmaOf",
    "HiddenKD",
    "HiddenKDSection",
    "LogitKD",
    "LogitKDSection",
    "Method",
    "Role",
    "SequenceKD",
    "SequenceKDSection",
    "Step",
    "Taid",
    "TaidSection",
    "Term",
    "Terms",
    "TokenMethod",
    "Trainable",
    "TsdKD",
    "TsdKDSection",
]
