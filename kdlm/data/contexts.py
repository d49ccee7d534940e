"""Contexts: what a teacher reads in its prompt and the student does not.

A solution, a demonstration, feedback or a skill is written into the prompt by a template; the answer's tokens stay what
they are. A batch then holds two readings of one answer, the student's and, in `theirs`, the teacher's, with each kept
position's place in the latter: nothing is tokenised again that could come out otherwise.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pydantic import Field, field_validator
from torch import Tensor

from kdlm.section import Section
from kdlm.signal import IGNORE_INDEX

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from kdlm.data.collate import Collator

Ids = list[int]

TEMPLATE = "{prompt}\n\nThis is an example of a good response:\n{context}\n\nNow answer with a response of your own.\n"


class ContextSection(Section):
    """How a prompt is written for whoever is told more."""

    template: str = TEMPLATE
    """The prompt with its context: `{prompt}` and `{context}` stand once each for the two. Of a conversation it is the
    last message of the user that is written so."""
    max_tokens: int = Field(1024, ge=1)
    """A context is cut to so many tokens, so that the answer never is."""

    @field_validator("template")
    @classmethod
    def _whole(cls, template: str) -> str:
        for name in ("{prompt}", "{context}"):
            if template.count(name) != 1:
                raise ValueError(f"{name} stands {template.count(name)} times in it, expected once")
        return template


class Reprompt:
    """Writes prompts that hold a context, as token ids.

    Args:
        tokenizer: the student's.
        section: the template.
        chat_template, variables: as of the data, for prompts that are conversations.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        section: ContextSection,
        chat_template: str | None = None,
        variables: dict[str, Any] | None = None,
    ):
        self.tokenizer, self.section = tokenizer, section
        self.chat_template, self.variables = chat_template, variables or {}

    @cached_property
    def _chat(self) -> Any:
        from kdlm.data.chat import ChatTemplate

        return ChatTemplate(self.tokenizer, self.chat_template, self.variables)

    @cached_property
    def _leading(self) -> Ids:
        from kdlm.data.encoding import leading_tokens

        return leading_tokens(self.tokenizer)

    def __call__(self, asked: str, context: str) -> Ids:
        """Return the prompt of `asked` (JSON: `prompt`, or `messages` and `tools`) with the context in it.

        Raises ValueError where a conversation has no message of a user to write it into.
        """
        question = json.loads(asked)
        told = self._cut(context)
        if "prompt" in question:
            return [*self._leading, *self._ids(self._written(question["prompt"], told))]
        messages = question["messages"]
        users = [number for number, message in enumerate(messages) if message["role"] == "user"]
        if not users:
            raise ValueError("data.context: a conversation without a message of the user has no place for a context")
        last = dict(messages[users[-1]])
        last["content"] = self._written(_text(last["content"]), told)
        changed = [*messages[: users[-1]], last, *messages[users[-1] + 1 :]]
        return self._ids(self._chat.text(changed, question["tools"], prompt=True))

    def _written(self, prompt: str, context: str) -> str:
        before, _, after = self.section.template.partition("{prompt}")
        return before.replace("{context}", context) + prompt + after.replace("{context}", context)

    def _cut(self, context: str) -> str:
        ids, most = self._ids(context), self.section.max_tokens
        return context if len(ids) <= most else str(self.tokenizer.decode(ids[:most]))

    def _ids(self, text: str) -> Ids:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])  # pyright: ignore[reportArgumentType]


@dataclass(frozen=True)
class ContextCollator:
    """Makes a batch of two readings of the same answers: the student's, and in it `theirs`, with what it is not told.

    A row's context is its `context_prompt` (token ids of a whole prompt), else its `context` (text; none or "" is no
    context) written into what it `asked`. The answer begins at `prompt_length`, by default with the last run of
    trained tokens. A row with a context is trained on its answer alone.

    To what `Collator` makes it adds `informed` `[sequences]`, which of them have a context; and, where any has one,
    `theirs`, the batch that the teacher reads, whose `at` `[batch, length]` says where each of our positions is in it,
    flattened; -1 in a prompt that it reads otherwise.

    Attributes:
        collator: lays out either reading.
        reprompt: writes a context into a prompt.
    """

    collator: "Collator"
    reprompt: Reprompt

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        pairs = [self._read(row) for row in rows]
        batch: dict[str, Any] = self.collator([ours for ours, _, _ in pairs])
        batch["informed"] = torch.tensor([start is not None for _, _, start in pairs])
        if batch["informed"].any():
            theirs: dict[str, Any] = self.collator([theirs for _, theirs, _ in pairs])
            batch["theirs"] = theirs | {"at": self._places(pairs, batch, theirs)}
        return batch

    def beside(self, values: Sequence[Any], batch: dict[str, Tensor], fill: int) -> Tensor:
        """Lay out numbers, one for each token of each row, as `Collator.beside` does."""
        return self.collator.beside(values, batch, fill)

    def _read(self, row: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], int | None]:
        """Return a row as the student and as the teacher read it, and where the answer begins if that differs."""
        told = row.get("context_prompt")
        if told is None and row.get("context"):
            told = self.reprompt(row["asked"], row["context"])
        if told is None:
            return row, row, None
        ids, labels = (list(map(int, row[name])) for name in ("input_ids", "labels"))
        start = int(row.get("prompt_length", answer_start(labels)))
        ours = {**row, "labels": [IGNORE_INDEX] * start + labels[start:]}
        theirs = {**row, "input_ids": [*told, *ids[start:]], "labels": [IGNORE_INDEX] * len(told) + labels[start:]}
        return ours, theirs, start

    def _places(self, pairs: list[tuple[dict, dict, int | None]], batch: dict, theirs: dict) -> Tensor:
        places, first = [], 0
        flat = self.collator.layout == "padding_free"
        for number, (ours, other, start) in enumerate(pairs):
            size, their_size = len(ours["input_ids"]), len(other["input_ids"])
            origin = first if flat else number * theirs["input_ids"].shape[1]
            place = np.arange(size) + origin + their_size - size
            if start is not None:
                place[: max(0, start - 1)] = -1  # the prompt's last token is where the answer's first is predicted
            places.append(place)
            first += their_size
        return self.collator.beside(places, batch, -1)


def answer_start(labels: Sequence[int]) -> int:
    """Return where the last run of trained tokens begins; the length of the row where there is none."""
    trained = np.flatnonzero(np.asarray(labels) != IGNORE_INDEX)
    if not len(trained):
        return len(labels)
    return int(trained[np.diff(trained, prepend=-2) > 1][-1])


def _text(content: Any) -> str:
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
