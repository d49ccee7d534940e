"""Candidates: mixtures drawn on the simplex, within what the sources can give."""

import numpy as np
from jaxtyping import Float

from kdlm.mix.sections import Candidates

Weights = Float[np.ndarray, "mixtures sources"]


def drawn(
    count: int,
    sizes: Float[np.ndarray, "sources"],
    samples: float,
    section: Candidates,
    generator: np.random.Generator,
) -> Weights:
    """Return mixtures, one a row, each of which adds up to 1 and keeps within its limits.

    Args:
        sizes: sequences of each source.
        samples: sequences that the run will train on.

    Raises ValueError where the sources are too small for such a run.
    """
    caps = np.minimum(1.0, section.most * sizes / samples)
    if caps.sum() < 1:
        raise ValueError(
            f"candidates.most: {section.most:g} times {int(sizes.sum())} sequences are less than the {int(samples)} "
            "that the run trains on: raise it, or train for fewer steps"
        )
    if section.least * len(sizes) > 1 or (caps < section.least).any():
        raise ValueError(f"candidates.least: {section.least:g} cannot be kept by every one of {len(sizes)} sources")
    centre = sizes**section.exponent / (sizes**section.exponent).sum()
    low, high = np.log(section.strength)
    strength = np.exp(generator.uniform(low, high, size=(count, 1)))
    # A Dirichlet sample is a row of gamma samples over its sum; of small strengths all of a row may be 0.
    gamma = generator.standard_gamma(np.maximum(strength * centre, 1e-3)) + 1e-300
    return limited(gamma / gamma.sum(1, keepdims=True), caps, section.least)


def limited(weights: Weights, caps: Float[np.ndarray, "sources"], least: float) -> Weights:
    """Return the mixtures with every weight between `least` and its cap: what is cut off goes to those with room.

    A mixture that is within the limits stays as it is. The caps add up to at least 1, and none is below `least`.
    """
    held = np.clip(weights, least, caps)
    for _ in range(2 * weights.shape[1] + 2):
        missing = 1 - held.sum(1, keepdims=True)
        room = np.where(missing > 0, caps - held, held - least)
        total = room.sum(1, keepdims=True)
        held = np.clip(held + np.divide(missing * room, total, out=np.zeros_like(room), where=total > 0), least, caps)
    return held
