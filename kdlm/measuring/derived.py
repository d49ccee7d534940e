"""Derived figures: what follows from means per token, and is no such mean itself."""

import math
from collections.abc import Mapping

from kdlm.metrics import gap_closed
from kdlm.speculation import expected_block_efficiency

DRAFTED = 5
"""Tokens that a draft proposes in a block, as in `kdlm speculate`."""


def derived(means: Mapping[str, float], *, drafted: int = DRAFTED) -> dict[str, float]:
    """Return the figures that follow from means per kept token, by name; those whose means are there.

    - `perplexity`, `teacher_perplexity`: e to the cross-entropy.
    - `bits_per_byte`, `teacher_bits_per_byte`: of cross-entropy and `bytes`; of a teacher with a tokenizer of its own,
      of `their_nats` and `their_bytes`, which it gives and spells on the same text.
    - `block_efficiency`: of `acceptance_rate`, with `drafted` tokens in a block: tokens that the teacher gives out each
      time it is run, if each drafted token is kept independently (arXiv 2211.17192, equation 1).
    - `gap_closed`: of three cross-entropies, with `baseline_cross_entropy` or else `start_cross_entropy`.
    """
    figures: dict[str, float] = {}
    sides = (("", "cross_entropy", "bytes"), ("teacher_", "teacher_cross_entropy", "bytes"))
    for prefix, nats, spelt in (*sides, ("teacher_", "their_nats", "their_bytes")):
        if nats in means and not nats.startswith("their"):
            figures[f"{prefix}perplexity"] = _exp(means[nats])
        if nats in means and spelt in means:
            figures[f"{prefix}bits_per_byte"] = _share(means[nats] / math.log(2), means[spelt])
    if "acceptance_rate" in means:
        figures["block_efficiency"] = expected_block_efficiency(means["acceptance_rate"], drafted)
    before = means.get("baseline_cross_entropy", means.get("start_cross_entropy"))
    if before is not None and {"cross_entropy", "teacher_cross_entropy"} <= set(means):
        figures["gap_closed"] = gap_closed(before, means["cross_entropy"], means["teacher_cross_entropy"])
    return figures


def _share(part: float, whole: float) -> float:
    return part / whole if whole and math.isfinite(whole) else math.nan


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf
