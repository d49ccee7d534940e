"""Triggers: which words of the prompt tell best that a pattern will be in the answer."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import hypergeom

from kdlm.audit.ngrams import NGrams
from kdlm.audit.patterns import phrase
from kdlm.audit.words import Reading


@dataclass(frozen=True)
class Trigger:
    """Words of the prompt with which a pattern comes more often than without.

    Attributes:
        text: the longest run of such words, for people.
        words: the shortest runs; a prompt that has all of them is triggered.
        p_value: of the association, times all n-grams and patterns that were tried.
        reference: documents of the reference whose prompt has them.
    """

    text: str
    words: tuple[str, ...]
    p_value: float
    reference: int

    def asked(self, prompt: Reading) -> bool:
        """Say whether a prompt has it."""
        return all(f" {run} " in prompt.words for run in self.words)


def trigger_of(
    holders: Sequence[int], prompts: NGrams, documents: int, *, least: int, tries: int, level: float
) -> Trigger | None:
    """Return the n-gram of the prompt that predicts best which documents hold a pattern; None if none does.

    Best by Fisher's exact test, one-sided, Bonferroni over n-grams and patterns. n-grams that the same documents hold
    predict equally well: they are one trigger.

    Args:
        holders: the documents that hold the pattern, of `documents`, numbered from 0; later ones are the reference's.
        least: prompts of a holder that must have the n-gram.
        tries: patterns that a trigger is looked for.
    """
    having, reference = prompts.counts(documents)
    hits = prompts.among(np.array(sorted(holders)))
    tried = np.flatnonzero(hits >= least)
    if not len(tried):
        return None
    p_values = hypergeom.sf(hits[tried] - 1, documents, having[tried], len(holders))
    best = tried[p_values == p_values.min()].tolist()
    p_value = min(1.0, float(p_values.min()) * int((having >= least).sum()) * tries)
    if p_value >= level:
        return None
    same = frozenset(prompts.holders(best[0]).tolist())
    alike: list[str] = [prompts.texts[gram] for gram in best if frozenset(prompts.holders(gram).tolist()) == same]
    longest = [one for one in alike if not any(one != other and f" {one} " in f" {other} " for other in alike)]
    shortest = [one for one in alike if not any(one != other and f" {other} " in f" {one} " for other in alike)]
    return Trigger(phrase(longest), tuple(shortest), p_value, int(reference[best[0]]))
