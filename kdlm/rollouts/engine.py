"""Engine: whatever turns prompts into completions with the student's weights.

Tokens are drawn from `softmax(logits / temperature)`, cut to `top_k` and `top_p` where these are set. The temperature
of a loss is another setting, of the loss.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from pydantic import Field

from kdlm.section import Section


class Sampling(Section):
    """How completions are drawn."""

    temperature: float = Field(1.0, ge=0)
    """Divides the logits before a token is drawn; 0 takes the most probable one. Not the temperature of the loss."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Draw only among the most probable tokens whose mass reaches this. Importance weights are exact at 1 alone."""
    top_k: int = Field(0, ge=0)
    """Draw only among so many of the most probable tokens; 0 among all. Importance weights are exact at 0 alone."""
    teacher_share: float = Field(0.0, ge=0, lt=1)
    """Draw from the teacher with this probability at each token, and else from the student (MiniLLM: 0.2): `generate`
    with a local teacher alone. Policy gradients weigh it out again."""
    max_new_tokens: int = Field(256, ge=1)
    """A completion that reaches this many tokens without its end is cut there."""
    samples_per_prompt: int = Field(1, ge=1)
    """Completions of each prompt, which form a group."""


@dataclass(frozen=True)
class Completion:
    """What an engine wrote after a prompt.

    Attributes:
        ids: the sampled tokens; the last one is the end token where it stopped by itself.
        log_probs: natural log-probability of each under the distribution that it was drawn from (temperature, `top_k`
            and `top_p` applied, mixed with the teacher's where it has a share; at temperature 0 the model's own), by
            the engine's own arithmetic.
        stop: `end` where an end token was drawn, `length` where it was cut.
        group: which of the prompts it follows, counted from 0.
        version: optimiser steps that the weights had seen.
    """

    ids: list[int]
    log_probs: list[float]
    stop: Literal["end", "length"]
    group: int
    version: int = 0


class Engine(Protocol):
    """Draws completions from a student. It keeps the weights that it last took, unless `lives` says otherwise."""

    lives: bool
    """Whether it reads the student's own parameters, so that it cannot run while they change."""

    def take(self, student: Any, version: int) -> None:
        """Take over the student's weights of after `version` optimiser steps."""
        ...

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling, seed: int) -> list[Completion]:
        """Return `samples_per_prompt` completions of every prompt, in the order of the prompts.

        The same seed, prompts and weights give the same completions. Prompts are token ids; prompt and completion
        together stay within the model's context: completions are cut there, with stop `length`.
        """
        ...

    def close(self) -> None:
        """Give back what the engine holds."""
        ...
