"""Sentences: where the sentences of a text begin, and how probable a model finds each."""

import math
import re
from bisect import bisect_right
from collections.abc import Sequence

_WIDE = "\u3002\uff01\uff1f"  # the same marks in Chinese and Japanese, which no white space follows
_GAP = re.compile(rf"\s+|(?<=[{_WIDE}])")
_CLOSED = re.compile(rf"[.!?{_WIDE}][\"'\u201d\u2019)\]*]*\Z")


def sentence_starts(text: str) -> list[int]:
    """Return the character at which each sentence begins; white space before a sentence belongs to it.

    A sentence ends at a line break, or after `.`, `!` or `?` where white space follows (so not in 3.14).
    """
    starts = [0] if text else []
    for gap in _GAP.finditer(text):
        ends = "\n" in gap[0] or _CLOSED.search(text[max(0, gap.start() - 4) : gap.start()])
        if ends and text[starts[-1] : gap.start()].strip() and gap.end() < len(text):
            starts.append(gap.start())
    return starts


def sentence_probabilities(
    log_probs: Sequence[float], offsets: Sequence[int], starts: Sequence[int]
) -> list[float | None]:
    """Return the probability of each sentence: the geometric mean of its tokens' probabilities.

    A token counts where it begins. None for a sentence in which none does.

    Args:
        log_probs: of each token, nats.
        offsets: the character at which each token begins.
        starts: the character at which each sentence begins.
    """
    sums, counts = [0.0] * len(starts), [0] * len(starts)
    for value, offset in zip(log_probs, offsets, strict=True):
        place = bisect_right(starts, offset) - 1
        sums[place] += value
        counts[place] += 1
    return [math.exp(total / count) if count else None for total, count in zip(sums, counts, strict=True)]
