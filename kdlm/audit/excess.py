"""Which things far more documents of one corpus hold than of another: an exact test, corrected for all tried."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int
from scipy.stats import binom, false_discovery_control


def share_of(documents: Sequence[int], words: Sequence[int]) -> float:
    """Return how likely something is ours if both corpora are alike: our share of documents, or of words if larger.

    Longer answers hold more of everything, so what they hold more of in proportion is no sign.
    """
    return max(documents[0] / sum(documents), words[0] / max(1, sum(words)))


def excess(
    ours: Int[np.ndarray, " items"], theirs: Int[np.ndarray, " items"], share: float, level: float
) -> tuple[Float[np.ndarray, " items"], int]:
    """Return an adjusted p-value for each item, 1 where it was not tested, and how many were.

    `ours` documents of the first corpus and `theirs` of the second hold it; alike, each would be ours with probability
    `share`: one-sided binomial test. Items whose least p-value, `share^(ours + theirs)`, is above level / K, of K
    tests, cannot become significant and are not tested (Tarone 1990; Gilbert 2005): that depends on totals alone,
    which say nothing of whose they are. Then Benjamini and Hochberg (1995): the expected share of chance in what is
    below `level` is no larger, and where the corpora are alike, nothing is with probability 1 - level (of items that
    depend on each other positively, as the n-grams of a text do).
    """
    total = ours + theirs
    attainable = np.sort(share ** total.astype(np.float64))
    tested = np.arange(1, len(attainable) + 1)
    over = np.flatnonzero(attainable > level / tested)  # the first item that would make it one test too many
    number = int(over[0]) if len(over) else len(attainable)
    adjusted = np.ones(len(total))
    if number:
        chosen = share ** total.astype(np.float64) <= attainable[number - 1]
        adjusted[chosen] = false_discovery_control(binom.sf(ours[chosen] - 1, total[chosen], share))
        number = int(chosen.sum())
    return adjusted, number
