"""Environment: whatever answers the student's turns, and the Section that names one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol, runtime_checkable

from pydantic import Field

from kdlm.rollouts.rows import Row
from kdlm.section import Section


@dataclass(frozen=True)
class Reply:
    """What an environment makes of one turn of the student's.

    Attributes:
        text: what it says, which the student reads before its next turn; not read after the last one.
        reward: of this turn.
        done: nothing is to come: the episode is over.
        feedback: what is said beside the reward, which the student does not read.
    """

    text: str
    reward: float
    done: bool
    feedback: str | None = None


@runtime_checkable
class Environment(Protocol):
    """One episode's world. It is made anew for each completion and pure: the same turns get the same replies."""

    def step(self, text: str) -> Reply:
        """Answer one turn of the student's, its text without special tokens. What it raises ends the run."""
        ...


Judging = Callable[[Sequence[str], Sequence[Row]], Sequence[tuple[float, str | None]]]
"""Texts, and the rows whose prompts they answer -> a score each, and what is said beside it."""


class EnvironmentSection(Section):
    """What the environments of a recipe have in common."""

    judged: ClassVar[bool] = False
    """Whether it asks the recipe's verifier itself. Where it does not and there is one, that judges the last turn, and
    its score is added to that turn's reward."""
    role: ClassVar[Literal["user", "tool"]] = "user"
    """Who speaks in a chat template."""

    turns: int = Field(4, ge=1)
    """The most turns of the student; the episode ends there, whatever the environment says."""
    max_tokens: int | None = Field(None, ge=2)
    """An episode with so many tokens, prompt included, gets no further turn; by default the model's context. Less than
    that where an engine reads less (`max_model_len`)."""
    reward: Literal["last", "sum"] = "last"
    """What an episode is worth: the reward of its last turn, or the sum over its turns."""
    success: float = Field(1.0, allow_inf_nan=False)
    """A last turn with at least this reward is a success (`rollout/success`)."""

    def reference(self) -> str | None:
        """Return the column of the data that episodes are made from; None where the verifier's is all there is."""
        return None

    def start(self, row: Row, judge: Judging | None) -> Environment:
        """Return the environment of one episode.

        Args:
            row: `input_ids`, `labels`, `index`, and as `reference` what the column holds.
            judge: the recipe's verifier; None without one.

        Raises ValueError where the row holds nothing that an episode can be made from.
        """
        raise NotImplementedError

    def replies(self, live: Sequence[Environment], texts: Sequence[str]) -> list[Reply]:
        """Step all live environments by one turn each."""
        return [environment.step(text) for environment, text in zip(live, texts, strict=True)]
