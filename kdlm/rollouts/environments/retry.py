"""The environment `retry`: the verifier judges the attempt, its feedback is said, and the student tries again."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from pydantic import Field

from kdlm.rollouts.environment import Environment, EnvironmentSection, Judging, Reply
from kdlm.rollouts.rows import Row


class RetrySection(EnvironmentSection):
    """The recipe's verifier judges each attempt; a wrong one is asked for again. The reward of a turn is its score."""

    judged: ClassVar[bool] = True

    name: Literal["retry"] = "retry"
    turns: int = Field(2, ge=1)
    """The most attempts."""
    until_right: bool = True
    """A right attempt, of `success` at least, is the last. False always asks for all of them, as SCoRe does."""
    ask: str = "{feedback}\nTry again:"
    """What is said after an attempt. `{feedback}` stands for the verifier's own words, or else for `wrong` or `right`;
    without it the student is not told how it did."""
    wrong: str = "That is not right."
    """Feedback where the verifier says nothing beside the score."""
    right: str = "That is right."
    """The same after a right attempt, which is read where `until_right` is false."""

    def start(self, row: Row, judge: Judging | None) -> "Retry":
        if judge is None:
            raise ValueError(
                "rollouts.environment: retry asks the recipe's verifier, and there is none: add `verifier`"
            )
        return Retry(self, row, judge)

    def replies(self, live: Sequence[Environment], texts: Sequence[str]) -> list[Reply]:
        """Judge all attempts at once, as the verifier's worker processes want it."""
        attempts = [one for one in live if isinstance(one, Retry)]
        said = attempts[0].judge(texts, [one.row for one in attempts]) if attempts else []
        return [one.heard(*judged) for one, judged in zip(attempts, said, strict=True)]


@dataclass(frozen=True)
class Retry:
    """One prompt and as many attempts as the section allows."""

    section: RetrySection
    row: Row
    judge: Judging

    def step(self, text: str) -> Reply:
        return self.heard(*self.judge([text], [self.row])[0])

    def heard(self, score: float, reason: str | None) -> Reply:
        """Make a reply of what the verifier said."""
        right = score >= self.section.success
        feedback = reason or (self.section.right if right else self.section.wrong)
        return Reply(
            self.section.ask.replace("{feedback}", feedback), score, right and self.section.until_right, reason
        )
