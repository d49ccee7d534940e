"""Writer: whatever continues a prompt in words: a server, vLLM or transformers in this process.

Rollouts (`kdlm.rollouts`) are of a student that trains and deal in token ids. Writers are of models that stay as they
are, may be known by their texts alone, and answer as many prompts as there are.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

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
        tokens: how many the model wrote, its end token among them where it says so.
        log_probs: of these tokens, nats, under the distribution that the writer says; None where not asked.
    """

    text: str
    stop: Literal["end", "length"]
    tokens: int
    log_probs: list[float] | None = None


@dataclass(frozen=True)
class Answered:
    """The continuations of a prompt, and how many tokens the prompt had."""

    texts: list[Text]
    prompt_tokens: int


@dataclass(frozen=True)
class Refused:
    """A prompt that this writer cannot answer, however often it is asked: too long, or filtered."""

    reason: str


class Writer(Protocol):
    """Continues prompts.

    Attributes:
        model, revision: as provenance calls them.
        at_once: how many requests are answered together, so that the texts depend on which; 1 where each stands alone.
    """

    model: str
    revision: str | None
    at_once: int

    def write(self, asked: Sequence[Asked]) -> Iterator[tuple[int, Answered | Refused]]:
        """Yield what became of each request, with its place in `asked`, as soon as it is known.

        Raises ServerUnavailable when the model cannot be reached any more: what was yielded stands.
        """
        ...

    def close(self) -> None:
        """Give back what the writer holds."""
        ...


class WriterSection(Section):
    """A model that writes."""

    def identity(self) -> dict[str, Any]:
        """Return what its texts depend on, as plain data, without opening it."""
        raise NotImplementedError

    def open(self, place: str) -> Writer:
        """Open it. Raises ValueError that names the key `place`, where that cannot be."""
        raise NotImplementedError


def begun(messages: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], str]:
    """Return the messages that are answered, and how the answer begins: the assistant's last message, else nothing."""
    if messages[-1]["role"] == "assistant":
        return messages[:-1], messages[-1]["content"]
    return messages, ""
