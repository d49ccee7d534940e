"""Verifier: whatever says how right a completion is; the verdict; and the Section that names one."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

from pydantic import Field

from kdlm.section import Section

REASON_LENGTH = 500
"""Characters of a reason that are kept."""


@dataclass(frozen=True)
class Verdict:
    """What is said of one completion.

    Attributes:
        score: by convention in [0, 1]; 0 where there was no judgement.
        outcome: `judged`; `raised` where the verifier failed or took its process with it; `timed_out`.
        reason: why there was no judgement, or what the verifier adds to it.
    """

    score: float
    outcome: Literal["judged", "raised", "timed_out"] = "judged"
    reason: str | None = None


@runtime_checkable
class Verifier(Protocol):
    """A pure function that judges one completion."""

    def __call__(self, completion: str, reference: Any, row: Mapping[str, Any]) -> Any:
        """Return a finite number or a bool, or a mapping of `score` and, if wanted, `reason`.

        Args:
            completion: the text after the prompt.
            reference: what the row's reference column holds; None where the verifier has no such column.
            row: the other columns of the row.
        """
        ...


class VerifierSection(Section):
    """A verifier and its options. `kdlm.verifiers.Judge` runs it over a batch."""

    limited: ClassVar[bool] = False
    """Whether it may hang or crash, and so runs in a process that can be killed."""

    column: str | None = "answer"
    """The column of the data that holds the reference; null gives the verifier none."""

    def verifier(self) -> Verifier:
        """Return the function that judges. Raises ValueError where an option or a package is amiss."""
        raise NotImplementedError

    def describe(self) -> str:
        """Return the name a reader knows this verifier by."""
        return self.name  # type: ignore[attr-defined]


class LimitedSection(VerifierSection):
    """A verifier that runs in a process of its own, which is killed when it takes too long."""

    limited: ClassVar[bool] = True

    timeout: float = Field(5.0, gt=0, allow_inf_nan=False)
    """Seconds that one completion may take. Where they are over it gets score 0 and is counted."""
    workers: int = Field(1, ge=1)
    """Processes that judge at once, for every process that trains."""

    @property
    def patience(self) -> float:
        """Seconds at one completion after which a worker is ended: more than `timeout` where it keeps to that."""
        return self.timeout


def verdict_of(judgement: Callable[[], Any]) -> Verdict:
    """Return the verdict that a verifier's call comes to: what it raises, or returns that is no score, is one too."""
    try:
        return _judged(judgement())
    except (Exception, SystemExit) as error:
        return Verdict(0.0, "raised", f"{type(error).__name__}: {error}".rstrip(": ")[:REASON_LENGTH])


def _judged(said: Any) -> Verdict:
    reason = None
    if isinstance(said, Mapping):
        if not {"score"} <= set(said) <= {"score", "reason"}:
            raise ValueError(f"returned a mapping of {sorted(map(str, said))}, expected `score` and perhaps `reason`")
        said, reason = said["score"], said.get("reason")
    if not isinstance(said, Real) and hasattr(said, "item"):  # a number of numpy or torch
        said = said.item()
    if not isinstance(said, Real):
        raise TypeError(f"returned a {type(said).__name__}, expected a number, a bool or a mapping with `score`")
    if not math.isfinite(score := float(said)):
        raise ValueError(f"returned {score}, expected a finite number")
    return Verdict(score, reason=None if reason is None else str(reason)[:REASON_LENGTH])
