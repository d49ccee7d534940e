"""Own text: what the student wrote, read by a teacher with another tokenizer.

It exists as the student's tokens alone. The teacher reads the text that they spell, after its own prompt.
"""

from functools import cached_property
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from kdlm.data.alignment import NONE, Aligner
from kdlm.data.encoding import leading_tokens
from kdlm.data.spelling import Spelling
from kdlm.signal import IGNORE_INDEX


class Reader:
    """Gives a row of the student's tokens the teacher's reading.

    The teacher's prompt is the row's `their_prompt` where it has one (rendered by the teacher's template), else the
    text of the student's. The answer is the text of the tokens after the student's prompt: up to the first one that is
    no text (the end of a character that was never finished, an unknown token), beyond which nothing is aligned. Control
    tokens at its end stand for the row's `their_closing`, by default the teacher's end-of-sequence token; those within
    it are read as their names.

    Raises ValueError where the student's tokens do not say which text they are.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase):
        self.tokenizer, self.teacher = tokenizer, teacher
        self.spelling = Spelling(tokenizer)

    @cached_property
    def align(self) -> Aligner:
        if not self.spelling.exact:
            raise ValueError(
                "the student's tokenizer does not give back the text that it reads, so its own text cannot be read by "
                "a teacher with another tokenizer"
            )
        return Aligner(self.spelling, Spelling(self.teacher))

    @cached_property
    def leading(self) -> list[int]:
        return leading_tokens(self.teacher)

    @cached_property
    def own_leading(self) -> list[int]:
        return leading_tokens(self.tokenizer)

    @cached_property
    def spaces(self) -> tuple[bool, bool]:
        """Whether the student's tokenizer puts a space of its own before a text, and after a control token."""
        control = next((self.tokenizer.convert_ids_to_tokens(i) for i in sorted(self.spelling.control)), "")
        return adds_space(self.spelling), adds_space(self.spelling, str(control))

    @cached_property
    def their_space(self) -> bool:
        return adds_space(self.align.theirs)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Return the columns that the row lacks."""
        ids, labels = (list(map(int, row[name])) for name in ("input_ids", "labels"))
        start = self._start(ids, labels, row)
        answer = ids[start:]
        while answer and answer[-1] in self.spelling.control:
            answer.pop()
        count, text = self._text(ids[:start], answer)
        prompt = list(map(int, row["their_prompt"])) if "their_prompt" in row else self._prompt(ids[:start])
        whole = count == len(answer)
        closing = self._closing(row) if whole and start + count < len(ids) else []
        their_ids = [*prompt, *self._after(prompt, text), *closing] or [0]
        their_labels = [*[IGNORE_INDEX] * len(prompt), *their_ids[len(prompt) :]]
        their_labels[0] = IGNORE_INDEX
        stop = len(ids) if whole else start + count
        chunks, their_chunks = self.align(ids[:stop], labels[:stop], their_ids, their_labels)
        chunks = np.pad(chunks, (0, len(ids) - stop), constant_values=NONE)
        return {"chunks": chunks, "their_ids": their_ids, "their_labels": their_labels, "their_chunks": their_chunks}

    def _start(self, ids: list[int], labels: list[int], row: dict[str, Any]) -> int:
        """Return where the last answer begins."""
        trained = np.flatnonzero(np.asarray(labels) != IGNORE_INDEX)
        if not len(trained):
            return len(ids)
        start = int(trained[np.diff(trained, prepend=NONE - 1) > 1][-1])
        bare = start == 1 and ids[0] not in self.spelling.control and "their_prompt" not in row
        return 0 if bare else start

    def _text(self, prompt: list[int], answer: list[int]) -> tuple[int, str]:
        """Return how many tokens of an answer, from the first on, are text, and which.

        It begins with the character that the prompt left unfinished.
        """
        known = next((n for n, i in enumerate(answer) if self.spelling.text([i]) is None), len(answer))
        before = self.spelling.text(self._segment(prompt)) or b""
        begun = before[len(finished(before)) :]
        spelt = begun + (self.spelling.text(answer[:known]) or b"")
        text = finished(spelt)
        ends = [len(begun) + int(end) for end in (0, *self.spelling.ends(answer[:known]))]
        count = max((n for n, end in enumerate(ends) if n and between(text, end)), default=0)
        return count, self._without_space(prompt, text[: ends[count]] if count else b"").decode()

    def _segment(self, ids: list[int]) -> list[int]:
        """Return the tokens after the last control token."""
        stops = [n for n, i in enumerate(ids) if i in self.spelling.control or self.spelling.text([i]) is None]
        return ids[stops[-1] + 1 :] if stops else ids

    def _without_space(self, prompt: list[int], text: bytes) -> bytes:
        """Leave out the space that the student's tokenizer puts where text begins."""
        begins = not prompt or prompt[-1] in self.spelling.control
        at_first, after_control = self.spaces
        spaced = at_first if prompt in ([], self.own_leading) else after_control
        return text.removeprefix(b" ") if begins and spaced else text

    def _prompt(self, ids: list[int]) -> list[int]:
        text = self.align.ours.text([i for i in ids if i not in self.spelling.control]) or b""
        said = finished(text.removeprefix(b" ") if self.spaces[0] else text).decode()
        return [*self.leading, *(self.align.theirs.ids(said) if said else [])]

    def _after(self, prompt: list[int], text: str) -> list[int]:
        """Return the teacher's tokens of a text that follows its prompt: as of one text, where the prompt's stay."""
        theirs = self.align.theirs
        if not text:
            return []
        control = [n for n, i in enumerate(prompt) if i in theirs.control]
        last = prompt[control[-1] + 1 :] if control else prompt
        before = theirs.text(last) if theirs.exact and last else None
        beginnings = []
        if before is not None and before == finished(before):
            beginnings.append(((before.removeprefix(b" ") if self.their_space else before).decode(), last))
            if self.their_space:  # apart from its prompt, a text would be given a space that nobody wrote
                beginnings.append(("\n", theirs.ids("\n")))
        for said, tokens in beginnings:
            joined = theirs.ids(said + text)
            if joined[: len(tokens)] == tokens:
                return joined[len(tokens) :]
        return theirs.ids(text)

    def _closing(self, row: dict[str, Any]) -> list[int]:
        if "their_closing" in row:
            return list(map(int, row["their_closing"]))
        eos: Any = self.teacher.eos_token_id
        return [] if eos is None else [int(eos)]


def finished(spelt: bytes) -> bytes:
    """Return the bytes up to the first one that belongs to no whole character."""
    try:
        spelt.decode()
    except UnicodeDecodeError as error:
        return spelt[: error.start]
    return spelt


def between(text: bytes, at: int) -> bool:
    """Whether a place in (or at the end of) whole characters is between two of them."""
    return at == len(text) or (at < len(text) and text[at] & 0xC0 != 0x80)


def adds_space(spelling: Spelling, before: str = "") -> bool:
    """Whether a tokenizer puts a space of its own before a text, here after `before`."""
    ids = [i for i in spelling.ids(f"{before}a") if i not in spelling.control]
    return (spelling.text(ids) or b"").startswith(b" ")
