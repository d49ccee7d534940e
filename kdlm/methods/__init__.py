"""Methods: what one training step computes. A new one is a file here, a line in the union, a recipe, a test."""

from typing import Annotated, Any, Literal

from pydantic import Field

from kdlm.methods.class_kd import ClassKD, ClassKDSection
from kdlm.methods.cross_tokenizer.aligned import AlignedMethod, Readings
from kdlm.methods.cross_tokenizer.alm import ALM, ALMSection
from kdlm.methods.cross_tokenizer.byte_kd import ByteKD, ByteKDSection
from kdlm.methods.cross_tokenizer.dskd import DSKD, DSKDSection
from kdlm.methods.cross_tokenizer.gold import GOLD, GOLDSection
from kdlm.methods.cross_tokenizer.outcomes import (
    SharedVocabularyKD,
    SharedVocabularyKDSection,
    VocabularyProjection,
    VocabularyProjectionSection,
)
from kdlm.methods.cross_tokenizer.tokenizer_transfer import TokenizerTransfer, TokenizerTransferSection
from kdlm.methods.cross_tokenizer.uld import ULD, ULDSection
from kdlm.methods.dataset.distribution_matching import DMSection, FeatureMeanMatching
from kdlm.methods.dataset.trajectory_matching import FTDSection, MTTSection, TrajectoryMatching
from kdlm.methods.diffusion.adversarial import DMD2Section, FDistillSection, LADDSection
from kdlm.methods.diffusion.cfg_distillation import CFGDistillationSection, GuidanceDistillation
from kdlm.methods.diffusion.consistency import (
    Consistency,
    ConsistencySection,
    LatentConsistency,
    LatentConsistencySection,
)
from kdlm.methods.diffusion.continuous_consistency import ContinuousConsistency, ContinuousConsistencySection
from kdlm.methods.diffusion.distribution_matching import DistributionMatching
from kdlm.methods.diffusion.mmd_ddm import MMDFineTuning, MMDFineTuningSection
from kdlm.methods.diffusion.progressive import Progressive, ProgressiveSection
from kdlm.methods.diffusion.reflow import Reflow, ReflowSection
from kdlm.methods.diffusion.reverse_kl import DMDSection, SDSSection, VSDSection
from kdlm.methods.diffusion.score_implicit import SiDSection, SIMSection
from kdlm.methods.diffusion.score_regularised_consistency import RCMSection, ScoreRegularisedConsistency
from kdlm.methods.distillm2 import DistiLLM2, DistiLLM2Section
from kdlm.methods.gkd import GKD, GKDSection
from kdlm.methods.grpo import GRPO, RLAD, GRPOSection, RLADSection
from kdlm.methods.hidden_kd import HiddenKD, HiddenKDSection
from kdlm.methods.llava_kd import LlavaKD, LlavaKDSection
from kdlm.methods.logit_kd import LogitKD, LogitKDSection
from kdlm.methods.masked.gdsd import GDSD, GDSDSection
from kdlm.methods.masked.masked_kd import MaskedKD, MaskedKDSection
from kdlm.methods.masked.masking import MaskedMethod
from kdlm.methods.method import Method, Preparation, Step, Term, Terms
from kdlm.methods.minillm import MiniLLM, MiniLLMSection
from kdlm.methods.policy import PolicyMethod
from kdlm.methods.preferences import DPO, DPOSection, PreferenceMethod, SimPO, SimPOSection
from kdlm.methods.redi import REDI, REDISection
from kdlm.methods.reverse_kl_advantage import ReverseKLAdvantage, ReverseKLAdvantageSection
from kdlm.methods.rewards import RewardMethod, RewardSection
from kdlm.methods.self_distillation.curio_sft import CurioSFT, CurioSFTSection
from kdlm.methods.self_distillation.further_pretraining import FurtherPretraining, FurtherPretrainingSection
from kdlm.methods.self_distillation.guided_generations import GuidedGenerations, GuidedGenerationsSection
from kdlm.methods.self_distillation.pi_distill import PiDistill, PiDistillSection
from kdlm.methods.self_distillation.privileged import SelfDistillation, SelfDistillationSection
from kdlm.methods.self_distillation.ps_kd import TokenPSKD, TokenPSKDSection
from kdlm.methods.self_distillation.recursive_kd import RecursiveKD, RecursiveKDSection
from kdlm.methods.self_distillation.rltf_fm import RLTFFM, RLTFFMSection
from kdlm.methods.self_distillation.rltf_sd import RLTFSD, RLTFSDSection
from kdlm.methods.self_distillation.score import SCoRe, SCoReSection
from kdlm.methods.self_distillation.sd_zero import SDZero, SDZeroSection
from kdlm.methods.self_distillation.sd_zero_revision import SDZeroRevision, SDZeroRevisionSection
from kdlm.methods.self_distillation.sdpo import SDPO, SDPOSection
from kdlm.methods.self_distillation.skill_sd import SkillSD, SkillSDSection
from kdlm.methods.self_distillation.unisd import UniSD, UniSDSection
from kdlm.methods.sequence_kd import SequenceKD, SequenceKDSection
from kdlm.methods.step_by_step import StepByStep, StepByStepSection
from kdlm.methods.structure.acm import ACM, ACMSection
from kdlm.methods.structure.layer_matching import LayerMatching, LayerMatchingSection
from kdlm.methods.structure.minilm import MiniLM, MiniLMSection
from kdlm.methods.structure.squarehead import SquareHead, SquareHeadSection
from kdlm.methods.structure.tinybert import TinyBERT, TinyBERTSection
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
from kdlm.methods.vision.ps_kd import PSKD, PSKDSection
from kdlm.methods.vision.rkd import RKD, RKDSection
from kdlm.methods.vision.uskd import USKD, USKDSection
from kdlm.roles import EmaOf, Role, SnapshotOf, Trainable
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
    | StepByStepSection
    | HiddenKDSection
    | SquareHeadSection
    | LayerMatchingSection
    | ACMSection
    | ReverseKLAdvantageSection
    | MiniLLMSection
    | GKDSection
    | GRPOSection
    | RLADSection
    | DistiLLM2Section
    | REDISection
    | DPOSection
    | SimPOSection
    | TsdKDSection
    | TokenPSKDSection
    | CurioSFTSection
    | GuidedGenerationsSection
    | RecursiveKDSection
    | FurtherPretrainingSection
    | MaskedKDSection
    | GDSDSection
    | MiniLMSection
    | TinyBERTSection
    | ClassKDSection
    | ALMSection
    | ByteKDSection
    | ULDSection
    | GOLDSection
    | SharedVocabularyKDSection
    | VocabularyProjectionSection
    | TokenizerTransferSection
    | DSKDSection
    | LlavaKDSection
    | ImageKDSection
    | SDSSection
    | VSDSection
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
    | DMD2Section
    | FDistillSection
    | SIMSection
    | SiDSection
    | LADDSection
    | MMDFineTuningSection
    | ReflowSection
    | ProgressiveSection
    | CFGDistillationSection
    | ConsistencySection
    | LatentConsistencySection
    | ContinuousConsistencySection
    | RCMSection
    | DMSection
    | MTTSection
    | FTDSection
    | SelfDistillationSection
    | SDPOSection
    | SDZeroRevisionSection
    | SDZeroSection
    | SkillSDSection
    | UniSDSection
    | RewardSection
    | RLTFSDSection
    | RLTFFMSection
    | SCoReSection
    | PiDistillSection
    | CustomMethod,
    Field(discriminator="name"),
]

__all__ = [
    "ACM",
    "ALM",
    "CRD",
    "DHO",
    "DMAE",
    "DPO",
    "DSKD",
    "GDSD",
    "GKD",
    "GOLD",
    "GRPO",
    "MEALV2",
    "OFAKD",
    "PSKD",
    "REDI",
    "RKD",
    "RLAD",
    "RLTFFM",
    "RLTFSD",
    "SDPO",
    "ULD",
    "USKD",
    "ACMSection",
    "ALMSection",
    "Affinity",
    "AffinitySection",
    "AlignedMethod",
    "AnyMethod",
    "AttentionTransfer",
    "AttentionTransferSection",
    "ByteKD",
    "ByteKDSection",
    "CFGDistillationSection",
    "CRDSection",
    "ClassKD",
    "ClassKDSection",
    "Consistency",
    "ConsistencySection",
    "ContinuousConsistency",
    "ContinuousConsistencySection",
    "CurioSFT",
    "CurioSFTSection",
    "CustomMethod",
    "DHOSection",
    "DMAESection",
    "DMD2Section",
    "DMDSection",
    "DMSection",
    "DPOSection",
    "DSKDSection",
    "DefensiveDistillation",
    "DefensiveSection",
    "DistiLLM2",
    "DistiLLM2Section",
    "DistributionMatching",
    "EmaOf",
    "FDistillSection",
    "FTDSection",
    "FeatureMeanMatching",
    "FitNet",
    "FitNetSection",
    "FurtherPretraining",
    "FurtherPretrainingSection",
    "GDSDSection",
    "GKDSection",
    "GOLDSection",
    "GRPOSection",
    "GuidanceDistillation",
    "GuidedGenerations",
    "GuidedGenerationsSection",
    "HiddenKD",
    "HiddenKDSection",
    "ImageKD",
    "ImageKDSection",
    "LADDSection",
    "LatentConsistency",
    "LatentConsistencySection",
    "LayerMatching",
    "LayerMatchingSection",
    "LlavaKD",
    "LlavaKDSection",
    "LogitKD",
    "LogitKDSection",
    "MEALV2Section",
    "MMDFineTuning",
    "MMDFineTuningSection",
    "MTTSection",
    "MaskedKD",
    "MaskedKDSection",
    "MaskedMethod",
    "Method",
    "MiniLLM",
    "MiniLLMSection",
    "MiniLM",
    "MiniLMSection",
    "OFAKDSection",
    "PSKDSection",
    "PiDistill",
    "PiDistillSection",
    "PolicyMethod",
    "PreferenceMethod",
    "Preparation",
    "Progressive",
    "ProgressiveSection",
    "RCMSection",
    "REDISection",
    "RKDSection",
    "RLADSection",
    "RLTFFMSection",
    "RLTFSDSection",
    "Readings",
    "RecursiveKD",
    "RecursiveKDSection",
    "Reflow",
    "ReflowSection",
    "ReverseKLAdvantage",
    "ReverseKLAdvantageSection",
    "RewardMethod",
    "RewardSection",
    "Role",
    "SCoRe",
    "SCoReSection",
    "SDPOSection",
    "SDSSection",
    "SDZero",
    "SDZeroRevision",
    "SDZeroRevisionSection",
    "SDZeroSection",
    "SIMSection",
    "ScoreRegularisedConsistency",
    "SelfDistillation",
    "SelfDistillationSection",
    "SequenceKD",
    "SequenceKDSection",
    "SharedVocabularyKD",
    "SharedVocabularyKDSection",
    "SiDSection",
    "SimPO",
    "SimPOSection",
    "SkillSD",
    "SkillSDSection",
    "SnapshotOf",
    "SquareHead",
    "SquareHeadSection",
    "Step",
    "StepByStep",
    "StepByStepSection",
    "Taid",
    "TaidSection",
    "Term",
    "Terms",
    "TinyBERT",
    "TinyBERTSection",
    "TokenMethod",
    "TokenPSKD",
    "TokenPSKDSection",
    "TokenizerTransfer",
    "TokenizerTransferSection",
    "Trainable",
    "TrajectoryMatching",
    "TsdKD",
    "TsdKDSection",
    "ULDSection",
    "USKDSection",
    "UniSD",
    "UniSDSection",
    "VSDSection",
    "VocabularyProjection",
    "VocabularyProjectionSection",
]
