"""Methods: what one training step computes. A new one is a file here, a line in the union, a recipe, a test."""

from typing import Annotated, Any, Literal

from pydantic import Field

from kdlm.methods.diffusion.distribution_matching import DistributionMatching, DMDSection
from kdlm.methods.distillm2 import DistiLLM2, DistiLLM2Section
from kdlm.methods.gkd import GKD, GKDSection
from kdlm.methods.hidden_kd import HiddenKD, HiddenKDSection
from kdlm.methods.logit_kd import LogitKD, LogitKDSection
from kdlm.methods.method import EmaOf, Method, Role, SnapshotOf, Step, Term, Terms, Trainable
from kdlm.methods.minillm import MiniLLM, MiniLLMSection
from kdlm.methods.policy import PolicyMethod
from kdlm.methods.reverse_kl_advantage import ReverseKLAdvantage, ReverseKLAdvantageSection
from kdlm.methods.sequence_kd import SequenceKD, SequenceKDSection
from kdlm.methods.taid import Taid, TaidSection
from kdlm.methods.tokens import TokenMethod
from kdlm.methods.tsd_kd import TsdKD, TsdKDSection
from kdlm.methods.vision.affinity import Affinity, AffinitySection
from kdlm.methods.vision.attention_transfer import AttentionTransfer, AttentionTransferSection
from kdlm.methods.vision.crd import CRD, CRDSection
from kdlm.methods.vision.defensive import DefensiveDistillation, DefensiveSection
from kdlm.methods.vision.dho import DHO, DHOSection
from kdlm.methods.vision.dmae import DMAE, DMAESection
from kdlm.methods.vision.fitnet import FitNet, FitNetSection
from kdlm.methods.vision.image_kd import ImageKD, ImageKDSection
from kdlm.methods.vision.meal_v2 import MEALV2, MEALV2Section
from kdlm.methods.vision.ofa_kd import OFAKD, OFAKDSection
from kdlm.methods.vision.ps_kd import PSKD, PSKDSection, TokenPSKD, TokenPSKDSection
from kdlm.methods.vision.rkd import RKD, RKDSection
from kdlm.methods.vision.uskd import USKD, USKDSection
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
    | TokenPSKDSection
    | ImageKDSection
    | FitNetSection
    | AttentionTransferSection
    | RKDSection
    | CRDSection
    | OFAKDSection
    | AffinitySection
    | DMAESection
    | PSKDSection
    | USKDSection
    | MEALV2Section
    | DHOSection
    | DefensiveSection
    | DMDSection
    | CustomMethod,
    Field(discriminator="name"),
]

__all__ = [
    "CRD",
    "DHO",
    "DMAE",
    "GKD",
    "MEALV2",
    "OFAKD",
    "PSKD",
    "RKD",
    "USKD",
    "Affinity",
    "AffinitySection",
    "AnyMethod",
    "AttentionTransfer",
    "AttentionTransferSection",
    "CRDSection",
    "CustomMethod",
    "DHOSection",
    "DMAESection",
    "DMDSection",
    "DefensiveDistillation",
    "DefensiveSection",
    "DistiLLM2",
    "DistiLLM2Section",
    "DistributionMatching",
    "EmaOf",
    "FitNet",
    "FitNetSection",
    "GKDSection",
    "HiddenKD",
    "HiddenKDSection",
    "ImageKD",
    "ImageKDSection",
    "LogitKD",
    "LogitKDSection",
    "MEALV2Section",
    "Method",
    "MiniLLM",
    "MiniLLMSection",
    "OFAKDSection",
    "PSKDSection",
    "PolicyMethod",
    "RKDSection",
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
    "TokenPSKD",
    "TokenPSKDSection",
    "Trainable",
    "TsdKD",
    "TsdKDSection",
    "USKDSection",
]
