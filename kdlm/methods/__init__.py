"""Methods: what one training step computes. A new one is a file here, a line in the union, a recipe, a test."""

from typing import Annotated, Any, Literal

from pydantic import Field

from kdlm.methods.diffusion.distribution_matching import DistributionMatching, DMDSection
from kdlm.methods.distillm2 import DistiLLM2, DistiLLM2Section
from kdlm.methods.gkd import GKD, GKDSection
from kdlm.methods.hidden_kd import HiddenKD, HiddenKDSection
from kdlm.methods.llava_kd import LlavaKD, LlavaKDSection
from kdlm.methods.logit_kd import LogitKD, LogitKDSection
from kdlm.methods.method import EmaOf, Method, Role, SnapshotOf, Step, Term, Terms, Trainable
from kdlm.methods.minillm import MiniLLM, MiniLLMSection
from kdlm.methods.policy import PolicyMethod
from kdlm.methods.reverse_kl_advantage import ReverseKLAdvantage, ReverseKLAdvantageSection
from kdlm.methods.sequence_kd import SequenceKD, SequenceKDSection
from kdlm.methods.taid import Taid, TaidSection
from kdlm.methods.tokens import TokenMethod
from kdlm.methods.tsd_kd import TsdKD, TsdKDSection
from kdlm.methods.vision.image_kd import ImageKD, ImageKDSection
from kdlm.section import Custom


class CustomMethod(Custom):
    """Your own method: `target` is a `kdlm.methods.Method` subclass, called with (losses, vocab=..., **args)."""

    name: Literal["custom"] = "custom"

    def build(self, losses: Any, vocab: Any) -> Method:
        return self.load()(losses, vocab=vocab, **self.args)


AnyMethod = Annotated[
    LogitKDSection
    | TaidSection
    | SequenceKDSection
    | HiddenKDSection
    | ReverseKLAdvantageSection
    | MiniLLMSection
    | GKDSection
    | DistiLLM2Section
    | TsdKDSection
    | LlavaKDSection
    | ImageKDSection
    | DMDSection
    | CustomMethod,
    Field(discriminator="name"),
]

__all__ = [
    "GKD",
    "AnyMethod",
    "CustomMethod",
    "DMDSection",
    "DistiLLM2",
    "DistiLLM2Section",
    "DistributionMatching",
    "EmaOf",
    "GKDSection",
    "HiddenKD",
    "HiddenKDSection",
    "ImageKD",
    "ImageKDSection",
    "LlavaKD",
    "LlavaKDSection",
    "LogitKD",
    "LogitKDSection",
    "Method",
    "MiniLLM",
    "MiniLLMSection",
    "PolicyMethod",
    "ReverseKLAdvantage",
    "ReverseKLAdvantageSection",
    "Role",
    "SequenceKD",
    "SequenceKDSection",
    "SnapshotOf",
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
