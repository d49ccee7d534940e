"""Losses: pure functions from logits to one value per row, and the wrapper that spares their memory."""

from typing import Annotated

from pydantic import Field

from kdlm.losses.adaptive import AdaptiveKL, adaptive_kl
from kdlm.losses.affinity import affinity, clip_loss
from kdlm.losses.attention import attention_transfer
from kdlm.losses.chunk_likelihood import ChunkDivergence, chunk_kl, chunk_likelihood
from kdlm.losses.chunked import chunked
from kdlm.losses.contrastive import contrast_in_batch, contrast_with_bank
from kdlm.losses.cross_entropy import CrossEntropy, cross_entropy
from kdlm.losses.custom import CustomLoss
from kdlm.losses.decoupled import DKD, decoupled_kl
from kdlm.losses.fused import plan_chunks
from kdlm.losses.jsd import JSD, generalised_jsd
from kdlm.losses.kl import ForwardKL, ReverseKL, forward_kl, reverse_kl
from kdlm.losses.likeliest import Likeliest, likeliest, told_of_likeliest
from kdlm.losses.log_probs import label_log_probs, teacher_log_probs, token_log_probs
from kdlm.losses.loss import Divergence, Loss, numbered_names
from kdlm.losses.low_bit import CAKLD, TopKLD, confidence_aware_kl, topk_divergence
from kdlm.losses.measures import all_measures_for, measures_for
from kdlm.losses.merged import Hybrid, merged_divergence
from kdlm.losses.mixture import AlphaMixture, alpha_mixture
from kdlm.losses.mmd import RBFMixture, energy_distance, mmd2, negative_distance, polynomial
from kdlm.losses.normalised import NKD, normalised_kd
from kdlm.losses.objective import weighted_sum
from kdlm.losses.ofa import OFA, ofa
from kdlm.losses.outcomes import Matched, OnOutcomes, Projected, Turned
from kdlm.losses.policy import importance_weights, k3, returns
from kdlm.losses.relational import correlation_distance, rkd_angle, rkd_distance
from kdlm.losses.relations import Apart, relation_kl, score_mse
from kdlm.losses.sampled import sampled_cross_entropy
from kdlm.losses.schedule import Constant, Cosine, Linear, Step, Weight, value_at
from kdlm.losses.selective import Selective, entropy, gated_jsd, plackett_luce
from kdlm.losses.skew import SkewKL, SkewReverseKL, skew_kl, skew_reverse_kl
from kdlm.losses.softened import Softened, softened_anchor, softening
from kdlm.losses.sorted_l1 import sorted_l1
from kdlm.losses.taid import TowardsTeacher, taid_kl
from kdlm.losses.teacher_free import label_share, progressive_cross_entropy, uskd, uskd_others, uskd_target
from kdlm.losses.tokens import count_kept, count_real, kept_rows, real_rows, reduce
from kdlm.losses.truncated import bucket, on_bucket
from kdlm.losses.tvd import TVD, TVDPlusPlus, total_variation, tvd_plus_plus
from kdlm.losses.vocabulary import label_places
from kdlm.signal import IGNORE_INDEX

AnyLoss = Annotated[
    CrossEntropy
    | ForwardKL
    | ReverseKL
    | SkewKL
    | SkewReverseKL
    | JSD
    | TVD
    | TVDPlusPlus
    | AdaptiveKL
    | AlphaMixture
    | TopKLD
    | CAKLD
    | DKD
    | NKD
    | OFA
    | CustomLoss,
    Field(discriminator="name"),
]
"""A loss of a recipe, chosen by its `name`."""

__all__ = [
    "CAKLD",
    "DKD",
    "IGNORE_INDEX",
    "JSD",
    "NKD",
    "OFA",
    "TVD",
    "AdaptiveKL",
    "AlphaMixture",
    "AnyLoss",
    "Apart",
    "ChunkDivergence",
    "Constant",
    "Cosine",
    "CrossEntropy",
    "CustomLoss",
    "Divergence",
    "ForwardKL",
    "Hybrid",
    "Likeliest",
    "Linear",
    "Loss",
    "Matched",
    "OnOutcomes",
    "Projected",
    "RBFMixture",
    "ReverseKL",
    "Selective",
    "SkewKL",
    "SkewReverseKL",
    "Softened",
    "Step",
    "TVDPlusPlus",
    "TopKLD",
    "TowardsTeacher",
    "Turned",
    "Weight",
    "adaptive_kl",
    "affinity",
    "all_measures_for",
    "alpha_mixture",
    "attention_transfer",
    "bucket",
    "chunk_kl",
    "chunk_likelihood",
    "chunked",
    "clip_loss",
    "confidence_aware_kl",
    "contrast_in_batch",
    "contrast_with_bank",
    "correlation_distance",
    "count_kept",
    "count_real",
    "cross_entropy",
    "decoupled_kl",
    "energy_distance",
    "entropy",
    "forward_kl",
    "gated_jsd",
    "generalised_jsd",
    "importance_weights",
    "k3",
    "kept_rows",
    "label_log_probs",
    "label_places",
    "label_share",
    "likeliest",
    "measures_for",
    "merged_divergence",
    "mmd2",
    "negative_distance",
    "normalised_kd",
    "numbered_names",
    "ofa",
    "on_bucket",
    "plackett_luce",
    "plan_chunks",
    "polynomial",
    "progressive_cross_entropy",
    "real_rows",
    "reduce",
    "relation_kl",
    "returns",
    "reverse_kl",
    "rkd_angle",
    "rkd_distance",
    "sampled_cross_entropy",
    "score_mse",
    "skew_kl",
    "skew_reverse_kl",
    "softened_anchor",
    "softening",
    "sorted_l1",
    "taid_kl",
    "teacher_log_probs",
    "token_log_probs",
    "told_of_likeliest",
    "topk_divergence",
    "total_variation",
    "tvd_plus_plus",
    "uskd",
    "uskd_others",
    "uskd_target",
    "value_at",
    "weighted_sum",
]
