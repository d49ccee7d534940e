"""Bands: which prompts a student solves always, sometimes or never, and what each of them is good for (Metis-RISE)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from kdlm.rollouts.rows import Written

Band = Literal["always", "sometimes", "never"]


@dataclass(frozen=True)
class PassRate:
    """In how many of its attempts at a prompt a student succeeded."""

    solved: int
    attempts: int

    @property
    def band(self) -> Band:
        if self.solved == 0:
            return "never"
        return "always" if self.solved == self.attempts else "sometimes"

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Return the exact interval (Clopper and Pearson 1934) of the probability of a success, at `level`.

        One-sided at both ends: never in K attempts bounds it by `1 - (1 - level)^(1/K)`, about 3 / K at 0.95, and no
        lower. So a band is a statement about K attempts.
        """
        from scipy.stats import beta

        miss = (1 - level) / (1 if self.band != "sometimes" else 2)
        failed = self.attempts - self.solved
        low = float(beta.ppf(miss, self.solved, failed + 1)) if self.solved else 0.0
        return low, float(beta.ppf(1 - miss, self.solved + 1, failed)) if failed else 1.0


@dataclass(frozen=True)
class Bands:
    """A three-way split of prompts by what became of the attempts at them.

    Attributes:
        rates: of each prompt, in their order.
        own: verified attempts at the prompts that are solved sometimes: different texts, none that was cut.
        never: numbers of the prompts that were never solved, for an expert. What is always solved teaches nothing more.
    """

    rates: list[PassRate]
    own: list[Written]
    never: list[int]


def banded(written: Sequence[Written], *, success: float = 1.0, most: int | None = None) -> Bands:
    """Split prompts by the rewards of their attempts: the stage between RL and SFT of arXiv 2506.13056 (its abstract).

    Args:
        written: all attempts at each prompt; `completion.group` numbers the prompts from 0 without a gap.
        success: reward from which on an attempt is right.
        most: verified attempts kept of a prompt, the first ones; None keeps all.

    Raises ValueError for an attempt without a reward, and for a prompt without an attempt.
    """
    groups: dict[int, list[Written]] = {}
    for one in written:
        if one.reward is None:
            raise ValueError(f"prompt {one.completion.group}: an attempt that nothing has judged")
        groups.setdefault(one.completion.group, []).append(one)
    if missing := sorted(set(range(max(groups, default=-1) + 1)) - set(groups)):
        raise ValueError(f"prompt {missing[0]}: no attempt at it")
    rates, own = [], []
    for group in (groups[number] for number in range(len(groups))):
        right = [one for one in group if one.reward is not None and one.reward >= success]
        rates.append(PassRate(len(right), len(group)))
        if rates[-1].band == "sometimes":
            ended: dict[str, Written] = {}
            for one in right:
                if one.completion.stop == "end":
                    ended.setdefault(one.text, one)
            own += list(ended.values())[:most]
    return Bands(rates, own, [number for number, rate in enumerate(rates) if rate.band == "never"])
