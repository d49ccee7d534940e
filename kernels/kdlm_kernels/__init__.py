"""Fused token losses: divergences from hidden states and heads at the speed of their matrix products.

Needs torch, and triton for its kernels; knows nothing of kdlm and works without it.
"""

from kdlm_kernels.chunks import Chunks, plan_chunks
from kdlm_kernels.heads import Head
from kdlm_kernels.linear import linear_divergence, linear_logprobs, linear_topk_divergence
from kdlm_kernels.terms import MEASURES, OPTIONS, Term

__all__ = [
    "MEASURES",
    "OPTIONS",
    "Chunks",
    "Head",
    "Term",
    "linear_divergence",
    "linear_logprobs",
    "linear_topk_divergence",
    "plan_chunks",
]
