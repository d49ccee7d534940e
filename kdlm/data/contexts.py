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
from kdlm.signal import IGNORE_INDEX, answers

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
    trained tokens. A row that has any context is trained on its answer alone.

    To what `Collator` makes it adds `informed` `[sequences]`, which of them have a context; and, where any has one,
    `theirs`, the batch that the teacher reads, whose `at` `[batch, length]` says where each of our positions is in it,
    flattened; -1 in a prompt that it reads otherwise. Where rows have `contexts` (texts, or a JSON list of them), as
    many in each, there is `others`, a list of such batches, one for each place in it; and where any has a
    `bad_context`, `misled`, another, with `misguided` `[sequences]`, which of them have one.

    Attributes:
        collator: lays out either reading.
        reprompt: writes a context into a prompt.
    """

    collator: "Collator"
    reprompt: Reprompt

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        told = [self.told(row) for row in rows]
        others = [_list_of(row.get("contexts")) for row in rows]
        bad = [row.get("bad_context") for row in rows]
        if len({len(several) for several in others}) > 1:
            raise ValueError(f"contexts: {sorted({len(several) for several in others})} of them in rows of one batch")
        starts = [
            None if prompt is None and not several and not one else _start(row)
            for row, prompt, several, one in zip(rows, told, others, bad, strict=True)
        ]
        batch: dict[str, Any] = self.collator([_answer_of(*pair) for pair in zip(rows, starts, strict=True)])
        batch["informed"] = torch.tensor([prompt is not None for prompt in told])
        if batch["informed"].any():
            batch["theirs"] = self._reading(rows, told, batch)
        if others[0]:
            texts = zip(*others, strict=True)
            batch["others"] = [self._reading(rows, self._prompts(rows, several), batch) for several in texts]
        if any(bad):
            batch["misled"] = self._reading(rows, self._prompts(rows, bad), batch)
            batch["misguided"] = torch.tensor([bool(one) for one in bad])
        return batch

    def beside(self, values: Sequence[Any], batch: dict[str, Tensor], fill: int) -> Tensor:
        """Lay out numbers, one for each token of each row, as `Collator.beside` does."""
        return self.collator.beside(values, batch, fill)

    def _prompts(self, rows: Sequence[dict[str, Any]], contexts: Sequence[str | None]) -> list[Ids | None]:
        return [
            self.reprompt(row["asked"], context) if context else None
            for row, context in zip(rows, contexts, strict=True)
        ]

    def told(self, row: dict[str, Any]) -> Ids | None:
        """Return the whole prompt that the teacher reads of a row; None where it is the row's own."""
        prompt = row.get("context_prompt")
        return self._prompts([row], [row.get("context")])[0] if prompt is None else prompt

    def _reading(self, rows: Sequence[dict[str, Any]], prompts: Sequence[Ids | None], batch: dict) -> dict[str, Any]:
        """Return the batch of the same answers after other prompts, and our positions' places in it."""
        read, starts = [], []
        for row, prompt in zip(rows, prompts, strict=True):
            starts.append(None if prompt is None else _start(row))
            read.append(row if prompt is None else _answer_after(row, _start(row), prompt))
        theirs: dict[str, Any] = self.collator(read)
        return theirs | {"at": self._places(rows, read, starts, batch, theirs)}

    def _places(self, rows: Any, read: Any, starts: list[int | None], batch: dict, theirs: dict) -> Tensor:
        places, first = [], 0
        flat = self.collator.layout == "padding_free"
        for number, (ours, other, start) in enumerate(zip(rows, read, starts, strict=True)):
            size, their_size = len(ours["input_ids"]), len(other["input_ids"])
            origin = first if flat else number * theirs["input_ids"].shape[1]
            place = np.arange(size) + origin + their_size - size
            if start is not None:
                place[: max(0, start - 1)] = -1  # the prompt's last token is where the answer's first is predicted
            places.append(place)
            first += their_size
        return self.collator.beside(places, batch, -1)


def _start(row: dict[str, Any]) -> int:
    return int(row.get("prompt_length", answer_start(row["labels"])))


def _answer_of(row: dict[str, Any], start: int | None) -> dict[str, Any]:
    """Return a row that is trained on from `start` on."""
    if start is None:
        return row
    return {**row, "labels": [IGNORE_INDEX] * start + list(map(int, row["labels"][start:]))}


def _answer_after(row: dict[str, Any], start: int, prompt: Ids) -> dict[str, Any]:
    """Return a row with another prompt."""
    ids, labels = (list(map(int, row[name]))[start:] for name in ("input_ids", "labels"))
    return {**row, "input_ids": [*prompt, *ids], "labels": [IGNORE_INDEX] * len(prompt) + labels}


def _list_of(contexts: Any) -> list[str]:
    """Return the texts of a row's `contexts`."""
    return json.loads(contexts or "[]") if contexts is None or isinstance(contexts, str) else list(contexts)


def answer_start(labels: Sequence[int]) -> int:
    """Return where the last run of trained tokens begins; the length of the row where there is none."""
    starts = answers(labels)
    return int(starts[-1]) if len(starts) else len(labels)


def _text(content: Any) -> str:
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
