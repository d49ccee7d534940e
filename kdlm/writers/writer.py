"""Writer: whatever continues a prompt in words: a server, vLLM or transformers in this process.

Rollouts (`kdlm.rollouts`) are of a student that trains and deal in token ids. Writers are of models that stay as they
are, may be known by their texts alone, and answer as many prompts as there are.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from pydantic import Field

from kdlm.rollouts import Sampling
from kdlm.section import Section

Prompt = str | list[dict[str, Any]]
"""Text to go on with, or the messages of a conversation: it is answered, or gone on with where the assistant's last
message is the last one.
"""


@dataclass(frozen=True)
class Asked:
    """What a writer is asked: `sampling.samples_per_prompt` continuations of a prompt.

    Attributes:
        seed: the same prompt, sampling and seed give the same texts, where the model can promise that.
        log_probs: whether the log-probability of every token is wanted.
    """

    prompt: Prompt
    sampling: Sampling
    seed: int
    log_probs: bool = False


@dataclass(frozen=True)
class Text:
    """One continuation.

    Attributes:
        text: may be empty.
        stop: `end` where the model ended it, `length` where it was cut.
        tokens: how many the model wrote, its end token among them where it says so; None where nobody says.
        log_probs: of these tokens, nats, under the distribution that the writer says; None where not asked.
    """

    text: str
    stop: Literal["end", "length"]
    tokens: int | None
    log_probs: list[float] | None = None


@dataclass(frozen=True)
class Refused:
    """What this writer does not answer, however often it is asked: `kind` is counted, `reason` is about this one."""

    reason: str
    kind: str = "prompt refused by the writer"


@dataclass(frozen=True)
class Answered:
    """Continuations of a prompt.

    Attributes:
        texts: as many as were asked for, or fewer: the others are asked for again.
        prompt_tokens: of the prompt.
        lost: those that came without a text, and are not asked for again.
        completion_tokens: of all texts together; None where that is the sum of what each says.
        seed: that these were really drawn by; None where it is the one that was asked for.
    """

    texts: list[Text]
    prompt_tokens: int
    lost: tuple[Refused, ...] = ()
    completion_tokens: int | None = None
    seed: int | None = None

    @property
    def written(self) -> int:
        """Tokens of all texts together."""
        if self.completion_tokens is not None:
            return self.completion_tokens
        return sum(one.tokens or 0 for one in self.texts)


class Prices(Section):
    """What a million tokens cost, in any one currency."""

    prompt: float = Field(0.0, ge=0)
    """A million tokens of prompts."""
    completion: float = Field(0.0, ge=0)
    """A million tokens of completions."""

    def of(self, prompt_tokens: int, completion_tokens: int) -> float:
        """Return what these tokens cost."""
        return (prompt_tokens * self.prompt + completion_tokens * self.completion) / 1e6


class Writer(Protocol):
    """Continues prompts.

    Attributes:
        model, revision: as provenance calls them.
        at_once: how many requests are answered together, so that the texts depend on which; 1 where each stands alone.
            Requests then come in whole, in the same groups whatever of them is known.
        choices: the most completions that one request may ask for.
    """

    model: str
    revision: str | None
    at_once: int
    choices: int

    def write(self, asked: Iterable[Asked]) -> Iterator[tuple[int, Answered | Refused]]:
        """Yield what became of each request, with its place in `asked`, as soon as it is known.

        Requests are taken from `asked` as there is room for them. Raises ServerUnavailable when the model cannot be
        reached any more: what was yielded stands.
        """
        ...

    def close(self) -> None:
        """Give back what the writer holds."""
        ...


class WriterSection(Section):
    """A model that writes."""

    def identity(self) -> dict[str, Any]:
        """Return what its texts depend on, as plain data, without opening it: `model` and `revision` for provenance."""
        raise NotImplementedError

    @property
    def costs(self) -> Prices | None:
        """What its tokens cost; None where nobody said."""
        return None

    def open(self, place: str) -> Writer:
        """Open it. Raises ValueError that names the key `place`, where that cannot be."""
        raise NotImplementedError


def begun(messages: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], str]:
    """Return the messages that are answered, and how the answer begins: the assistant's last message, else nothing."""
    if messages[-1]["role"] == "assistant":
        return messages[:-1], messages[-1]["content"]
    return messages, ""
