"""What a measurement of speculative decoding says, with standard errors over the prompts."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from kdlm.estimates import Estimate, jackknife


@dataclass(frozen=True)
class Position:
    """One place in a block, the first being 1.

    Attributes:
        proposed: blocks in which the draft proposed a token here.
        tested: those in which all tokens before it were kept, so that this one was up.
        accepted: those in which it was kept too.
        acceptance: accepted / tested. `accepted / proposed` is the curve that vLLM shows.
    """

    proposed: int
    tested: int
    accepted: int
    acceptance: Estimate


@dataclass(frozen=True)
class SpeculationReport:
    """What decoding with a draft gave. Standard errors are a jackknife over the prompts.

    Attributes:
        drafted: tokens that the draft was to propose in a block (gamma).
        temperature: that of target and draft; at 0 acceptance is how often their most probable tokens are the same.
        prompts, repeats, max_new_tokens, seed: what was decoded: every prompt so many times.
        target_passes: forward passes of the target, which is blocks.
        emitted: tokens written.
        proposed, accepted: the draft's tokens, and those that were kept.
        positions: the same by place in the block.
        acceptance: accepted / tested: how often a token that is up is kept (alpha). Its expectation is the mean of
            1 - TVD(target, draft) over the states that were visited; tokens behind a refused one do not count.
        accepted_share: accepted / proposed, refused or never looked at. Smaller, and it falls with `drafted`.
        block_efficiency: emitted / target_passes (tau), at most drafted + 1.
        expected_block_efficiency: what tau would be if each token were kept with probability `acceptance` whatever
            came before, and no block were cut short (arXiv 2211.17192, equation 1).
        cost_ratio: seconds per token of the draft alone / of the target alone (c).
        speedup: tokens per second with the draft / of the target alone, by the clock.
        expected_speedup: tau / (c * drafted + 1): without the cost of checking and of the loop around the models, and
            as if the target read drafted + 1 tokens as fast as one (arXiv 2211.17192, theorem 3.8 with measured tau).
        tokens_per_second, target_tokens_per_second, draft_tokens_per_second: with the draft; each model alone.
        seconds, target_seconds, draft_seconds: time spent on each of the three.
        same_texts: texts equal to those of the target alone, at temperature 0 (in half precision, ties may fall the
            other way); None at other temperatures.
    """

    drafted: int
    temperature: float
    prompts: int
    repeats: int
    max_new_tokens: int
    seed: int
    target_passes: int
    emitted: int
    proposed: int
    accepted: int
    positions: tuple[Position, ...]
    acceptance: Estimate
    accepted_share: Estimate
    block_efficiency: Estimate
    expected_block_efficiency: Estimate
    cost_ratio: Estimate
    speedup: Estimate
    expected_speedup: Estimate
    tokens_per_second: Estimate
    target_tokens_per_second: Estimate
    draft_tokens_per_second: Estimate
    seconds: float
    target_seconds: float
    draft_seconds: float
    same_texts: int | None

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers for JSON: estimates as value and error, None for what could not be told."""
        return _finite(asdict(self))

    def lines(self) -> Iterator[str]:
        """Yield the report for people, a line each."""
        kept = " ".join(f"{place.acceptance.value:.2f}" for place in self.positions)
        yield f"decoded: {self.prompts} prompts x {self.repeats}, temperature {self.temperature:g}, seed {self.seed}"
        yield (
            f"tokens: {self.emitted} in {self.target_passes} target passes; {self.proposed} drafted, "
            f"{self.accepted} of them kept"
        )
        yield f"acceptance: {self.acceptance} of the tokens that were up; by place in the block: {kept}"
        yield f"accepted / proposed: {self.accepted_share}"
        yield (
            f"block efficiency: {self.block_efficiency} tokens a target pass (most {self.drafted + 1}; "
            f"{self.expected_block_efficiency.value:.3f} if tokens were independent)"
        )
        yield (
            f"tokens per second: {self.tokens_per_second.value:.1f} with the draft, target alone "
            f"{self.target_tokens_per_second.value:.1f}, draft alone {self.draft_tokens_per_second.value:.1f}"
        )
        yield (
            f"speed-up: {self.speedup} by the clock; {self.expected_speedup.value:.3f} from block efficiency and a "
            f"draft that costs {self.cost_ratio.value:.3f} of a target pass"
        )
        if self.same_texts is not None:
            yield f"texts equal to the target's own: {self.same_texts} of {self.prompts * self.repeats}"


def expected_block_efficiency(acceptance: float, drafted: int) -> float:
    """Return `(1 - a^(g+1)) / (1 - a)`, the tokens of a block when each is kept independently with probability a.

    Source: arXiv 2211.17192, equation 1. At a = 1 it is g + 1.
    """
    return sum(acceptance**place for place in range(drafted + 1))


Sums = defaultdict[str, float]


class Counts:
    """What was counted, by prompt, and figures from it.

    A figure is a function of the sums over all prompts; its error comes from leaving out one prompt after another:
    the tokens of one text depend on each other, texts of different prompts do not.
    """

    def __init__(self, prompts: Sequence[Mapping[str, float]]) -> None:
        self.columns = sorted(set().union(*prompts))
        self.rows = np.array([[counts.get(column, 0.0) for column in self.columns] for counts in prompts])
        self.sums = self._named(self.rows.sum(0))

    def estimate(self, figure: Callable[[Sums], float]) -> Estimate:
        """Return `figure` of the sums with its jackknife standard error."""

        def of(sums: Sums) -> float:
            try:
                return figure(sums)
            except ZeroDivisionError:
                return math.nan

        return jackknife(self.rows, lambda sums: of(self._named(sums)))

    def _named(self, sums: np.ndarray) -> Sums:
        return defaultdict(float, zip(self.columns, sums.tolist(), strict=True))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
