"""n-grams: which documents hold which runs of one to five words, counted in sorted arrays."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
from jaxtyping import Bool, Int

LONGEST = 5


@dataclass(frozen=True)
class Segment:
    """Words of one text of a document; no n-gram reaches from one to the next.

    Attributes:
        words: each between spaces.
        document: its number.
        asked: whether it is the prompt, or of an answer.
    """

    words: str
    document: int
    asked: bool


@dataclass(frozen=True)
class NGrams:
    """Which document holds which n-gram, sorted by n-gram, then by document.

    Attributes:
        texts: the n-grams, words with spaces between.
        grams, documents: `[pairs]`, without repetition.
    """

    texts: list[str]
    grams: Int[np.ndarray, " pairs"]
    documents: Int[np.ndarray, " pairs"]

    def counts(self, below: int) -> tuple[Int[np.ndarray, " grams"], Int[np.ndarray, " grams"]]:
        """Return how many documents hold each n-gram: of those numbered below `below`, and of the others."""
        ours = self.documents < below
        number = len(self.texts)
        return np.bincount(self.grams[ours], minlength=number), np.bincount(self.grams[~ours], minlength=number)

    def holders(self, gram: int) -> Int[np.ndarray, " documents"]:
        """Return the documents that hold an n-gram."""
        begin, end = np.searchsorted(self.grams, [gram, gram + 1])
        return self.documents[begin:end]

    def among(self, documents: Int[np.ndarray, " documents"]) -> Int[np.ndarray, " grams"]:
        """Return how many of these documents hold each n-gram."""
        return np.bincount(self.grams[np.isin(self.documents, documents)], minlength=len(self.texts))


def ngrams(segments: Sequence[Segment], below: int, least: int) -> tuple[NGrams, NGrams]:
    """Return the n-grams of answers, and those of prompts, with the documents that hold them.

    An n-gram of an answer is not counted where the document's own prompt has it: that is an echo, such as the subject
    that was asked about.

    Args:
        below: only n-grams that at least `least` documents numbered below this hold, in prompt or answer, are kept.
    """
    texts: list[str] = []
    pairs: list[list[np.ndarray]] = [[], []]
    documents = 1 + max(segment.document for segment in segments)
    for grams, document, asked, named in _levels(segments, below, least):
        for part in (0, 1):
            chosen = asked == part
            pairs[part].append(np.unique((grams[chosen] + len(texts)) * documents + document[chosen]))
        texts += named
    answered, prompted = (np.concatenate(part) for part in pairs)
    answered = np.setdiff1d(answered, prompted, assume_unique=True)
    return tuple(NGrams(texts, codes // documents, codes % documents) for codes in (answered, prompted))  # type: ignore


Level = tuple[np.ndarray, np.ndarray, np.ndarray, list[str]]


def _levels(segments: Sequence[Segment], below: int, least: int) -> Iterator[Level]:
    """Yield, for each length, n-gram, document and `asked` of the positions where it begins, and the n-grams' texts.

    A run of n words cannot be in more documents than the two runs of n - 1 in it, so the rare ones are left out early.
    """
    split = [segment.words.split() for segment in segments]
    lengths = np.array([len(words) for words in split])
    number: dict[str, int] = {}
    ids = np.fromiter((number.setdefault(word, len(number)) for word in chain(*split)), np.int64, int(lengths.sum()))
    vocabulary = list(number)
    words = ids.copy()
    segment = np.repeat(np.arange(len(segments)), lengths)
    document = np.repeat(np.array([segment.document for segment in segments]), lengths)
    asked = np.repeat(np.array([segment.asked for segment in segments]), lengths).astype(np.int64)
    alive, texts = np.ones(len(ids), dtype=bool), []
    for length in range(1, LONGEST + 1):
        if length > 1:
            alive[:-1] &= alive[1:] & (segment[:-1] == segment[1:])
            alive[-1:] = False
            at = np.flatnonzero(alive)
            _, ids[at] = np.unique(ids[at] * len(texts) + ids[at + 1], return_inverse=True)
        at = np.flatnonzero(alive)
        alive[at] = _frequent(ids[at], document[at], below, least)[ids[at]]
        at = np.flatnonzero(alive)
        _, first, ids[at] = np.unique(ids[at], return_index=True, return_inverse=True)
        texts = [" ".join(vocabulary[word] for word in words[begin : begin + length]) for begin in at[first]]
        yield ids[at], document[at], asked[at], texts


def _frequent(
    grams: Int[np.ndarray, " n"], document: Int[np.ndarray, " n"], below: int, least: int
) -> Bool[np.ndarray, " grams"]:
    ours = document < below
    pairs = np.unique(grams[ours] * below + document[ours])
    return np.bincount(pairs // below, minlength=grams.max(initial=0) + 1) >= least
