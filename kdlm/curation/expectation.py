"""The step `expectation`: which of several rationales explains a problem, the E-step of PromptCoT 2.0."""

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, Literal

from datasets import Dataset
from pydantic import Field

from kdlm.curation.rows import with_columns
from kdlm.curation.step import Desk, Step, lacks


class Expectation(Step):
    """The E-step of PromptCoT 2.0 (arXiv 2509.19894; the reward as in its text, the rest as we understand EM).

    Concepts c, a rationale z, a problem x: the reward of z is log p(z|c) + log p(x|z,c), by two `score` before. Adds
    `reward`, `copied` (the share of x's words that z has in runs of four), and `posterior`: the softmax of the rewards
    over the different rationales of one problem, which is the best q over these. `select` by `reward` for the single
    best one (hard EM), or train with `columns: {weight: posterior}` (soft). The same rationale again is left out.
    """

    name: Literal["expectation"] = "expectation"
    of_each: str = "prompt_id"
    """The column that rationales of one problem share."""
    rationale: str = "completion"
    """The column of z."""
    problem: str = "problem"
    """The column of x."""
    prior: str = "prior"
    """What the columns of log p(z|c) begin with: `into` of its `score`."""
    likelihood: str = "likelihood"
    """What the columns of log p(x|z,c) begin with."""
    copy_penalty: float = Field(0.0, ge=0)
    """Nats taken off the reward of a rationale that copies the whole problem, and of others by the share they copy: a
    copy makes the problem certain and explains nothing."""

    def run(self, rows: Dataset, desk: Desk) -> Dataset:
        self.leaves(rows.column_names)
        groups: dict[Any, dict[str, int]] = defaultdict(dict)
        made: dict[int, tuple[float, float]] = {}
        for number, row in enumerate(map(dict, rows)):
            prior, likelihood, text = (row[name] for name in (*self._scores(), self.rationale))
            if None in (prior, likelihood, text):
                desk.counts.note("not scored", f"row {number}")
                continue
            if groups[row[self.of_each]].setdefault(text, number) != number:
                desk.counts.note("the same rationale again", f"row {number}")
                continue
            share = copied(text, row[self.problem] or "")
            made[number] = (prior + likelihood - self.copy_penalty * share, share)
        weights: dict[int, float] = {}
        bounds = []
        for group in groups.values():
            rewards = [made[number][0] for number in group.values()]
            weights |= dict(zip(group.values(), posterior(rewards), strict=True))
            bounds.append(bound([weights[number] for number in group.values()], rewards))
        if bounds:
            desk.counts.figures["bound, nats a problem"] = sum(bounds) / len(bounds)
        kept = sorted(made)
        own = {
            "reward": [made[number][0] for number in kept],
            "copied": [made[number][1] for number in kept],
            "posterior": [weights[number] for number in kept],
        }
        return with_columns(rows.select(kept), own)

    def leaves(self, before: list[str]) -> list[str]:
        lacks(before, self.of_each, self.rationale, self.problem, *self._scores(), by="expectation")
        return list(dict.fromkeys([*before, "reward", "copied", "posterior"]))

    def _scores(self) -> tuple[str, str]:
        return f"{self.prior}_log_prob", f"{self.likelihood}_log_prob"


def posterior(rewards: Sequence[float]) -> list[float]:
    """Return the q over some rationales that makes `bound` largest: the softmax of log p(z|c) + log p(x|z,c)."""
    most = max(rewards, default=0.0)
    masses = [math.exp(reward - most) for reward in rewards]
    return [mass / sum(masses) for mass in masses]


def bound(q: Sequence[float], rewards: Sequence[float]) -> float:
    """Return E_q[log p(x,z|c)] + H(q), in nats: at most log p(x|c), and that at the exact posterior over all z."""
    return sum(mass * (reward - math.log(mass)) for mass, reward in zip(q, rewards, strict=True) if mass)


def copied(rationale: str, problem: str, run: int = 4) -> float:
    """Return the share of a problem's runs of words that its rationale holds; a shorter problem is one run."""
    inside, words = f" {' '.join(rationale.split())} ", problem.split()
    runs = [words[at : at + run] for at in range(max(1, len(words) - run + 1))] if words else []
    return sum(f" {' '.join(one)} " in inside for one in runs) / len(runs) if runs else 0.0
