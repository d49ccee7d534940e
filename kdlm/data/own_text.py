"""Own text: what the student wrote, read by a teacher with another tokenizer.

It exists as the student's tokens alone. The teacher reads the text that they spell, after its own prompt.
"""

from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from kdlm.data.alignment import NONE, Shared, without
from kdlm.data.encoding import leading_tokens
from kdlm.signal import IGNORE_INDEX, answers
from kdlm.spelling import Spelling, spelling_of

NO_TEXT = b"\xff"
"""A byte that is in no character: what an unknown token says."""
REPLACED = "\ufffd"
"""What the teacher reads where the student wrote no character."""
NOT_EXACT = (
    "the student's tokenizer does not give back the text that it reads, so its own text cannot be read by a teacher "
    "with another tokenizer"
)


class Said(NamedTuple):
    """The text of an answer, where each of its tokens ends in the bytes of that text, and if a prompt began it."""

    text: str
    ends: np.ndarray
    begun: bool


class Reader:
    """Gives a row of the student's tokens the teacher's reading.

    The teacher's prompt is the row's `their_prompt` where it has one (rendered by the teacher's template), else the
    text of the student's. The answer is what the tokens after the student's prompt say. What is no text in it (bytes of
    no character, an unknown token) is U+FFFD to the teacher, whose likelihood of that then holds for what the student
    wrote: were it passed over, a student could flee into it. Control tokens within an answer are read as their names;
    those at its end stand for the row's `their_closing`, by default the teacher's end-of-sequence token. An answer that
    was cut inside a character is read up to there.

    Raises ValueError where the student's tokens do not say which text they are.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase):
        self.tokenizer, self.teacher = tokenizer, teacher
        self.spelling = spelling_of(tokenizer)

    @cached_property
    def theirs(self) -> Spelling:
        """What the teacher's tokens spell."""
        if not self.spelling.exact:
            raise ValueError(NOT_EXACT)
        return spelling_of(self.teacher)

    @cached_property
    def leading(self) -> list[int]:
        """What the teacher's tokenizer puts before a text of its own accord."""
        return leading_tokens(self.teacher)

    @cached_property
    def own_leading(self) -> list[int]:
        """What the student's does."""
        return leading_tokens(self.tokenizer)

    @cached_property
    def spaces(self) -> tuple[bool, bool]:
        """Whether the student's tokenizer puts a space of its own before a text, and after a control token."""
        control = next((self.tokenizer.convert_ids_to_tokens(i) for i in sorted(self.spelling.control)), "")
        return adds_space(self.spelling), adds_space(self.spelling, str(control))

    @cached_property
    def their_space(self) -> bool:
        """Whether the teacher's tokenizer puts a space of its own before a text."""
        return adds_space(self.theirs)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Return the columns that the row lacks."""
        ids, labels = (list(map(int, row[name])) for name in ("input_ids", "labels"))
        start = self._start(ids, labels, row)
        stop = len(ids)
        while stop > start and ids[stop - 1] in self.spelling.control:
            stop -= 1
        said = self._said(ids[:start], ids[start:stop], cut=stop == len(ids))
        prompt = list(map(int, row["their_prompt"])) if "their_prompt" in row else self._prompt(ids[:start])
        answer, closing = self._after(prompt, said.text), self._closing(row) if stop < len(ids) else []
        their_ids = [*prompt, *answer, *closing] or [0]
        their_labels = [*[IGNORE_INDEX] * len(prompt), *their_ids[len(prompt) :]]
        their_labels[0] = IGNORE_INDEX
        chunks, their_chunks = np.full(len(ids), NONE), np.full(len(their_ids), NONE)
        spans = slice(start, stop), slice(len(prompt), len(prompt) + len(answer))
        chunks[spans[0]], their_chunks[spans[1]] = self._chunks(said, answer)
        if closing and (not answer or their_chunks.max() > NONE):
            chunks[stop:] = their_chunks[spans[1].stop :] = chunks.max(initial=NONE) + 1
        untrained, theirs = (np.asarray(numbers) == IGNORE_INDEX for numbers in (labels, their_labels))
        chunks, their_chunks = without(chunks, untrained, their_chunks, theirs)
        return {"chunks": chunks, "their_ids": their_ids, "their_labels": their_labels, "their_chunks": their_chunks}

    def _start(self, ids: list[int], labels: list[int], row: dict[str, Any]) -> int:
        """Return where the last answer begins."""
        starts = answers(labels)
        if not len(starts):
            return len(ids)
        start = int(starts[-1])
        bare = start == 1 and ids[0] not in self.spelling.control and "their_prompt" not in row
        return 0 if bare else start

    def _said(self, prompt: list[int], answer: list[int], *, cut: bool) -> "Said":
        """Return what an answer says; it begins with the character that the prompt left unfinished."""
        before = self.spelling.text(self._segment(prompt)) or b""
        begun = before[len(finished(before)) :]
        pieces = [self.spelling.text([i]) or NO_TEXT for i in answer]
        text, places = decoded(begun + b"".join(pieces), cut=cut)
        ends = places[len(begun) + np.cumsum([len(piece) for piece in pieces], dtype=np.int64)]
        if text.startswith(" ") and self._spaced(prompt):
            text, ends = text[1:], ends - 1
        return Said(text, ends, bool(begun))

    def _chunks(self, said: "Said", answer: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """Return the chunk of each token of an answer, the student's and the teacher's."""
        theirs, spelt = self.theirs, said.text.encode()
        if theirs.exact:
            read = theirs.text(answer)
            added = None if read is None or not read.endswith(spelt) else read[: len(read) - len(spelt)]
            ends = theirs.ends(answer) - len(added) if added in (b"", b" ") else None  # SentencePiece's own space
        else:
            ends = theirs.ends_in(spelt, answer) if answer else np.zeros(0, dtype=np.int64)
        if ends is None:
            return np.full(len(said.ends), NONE), np.full(len(answer), NONE)
        # the first character was begun by the prompt: of it, a part is not in the answer
        return Shared(said.ends, ends, len(spelt), True, late=(said.begun, False)).chunks(0)[:2]

    def _segment(self, ids: list[int]) -> list[int]:
        """Return the tokens after the last control token."""
        stops = [n for n, i in enumerate(ids) if i in self.spelling.control or self.spelling.text([i]) is None]
        return ids[stops[-1] + 1 :] if stops else ids

    def _spaced(self, prompt: list[int]) -> bool:
        """Whether the student's tokenizer puts a space of its own before text that follows a prompt."""
        at_first, after_control = self.spaces
        begins = not prompt or prompt[-1] in self.spelling.control
        return begins and (at_first if prompt in ([], self.own_leading) else after_control)

    def _prompt(self, ids: list[int]) -> list[int]:
        text = finished(self.spelling.text([i for i in ids if i not in self.spelling.control]) or b"").decode()
        said = text.removeprefix(" ") if self.spaces[0] else text
        return [*self.leading, *(self.theirs.ids(said) if said else [])]

    def _after(self, prompt: list[int], text: str) -> list[int]:
        """Return the teacher's tokens of a text that follows its prompt: as of one text, where the prompt's stay."""
        theirs = self.theirs
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


def decoded(spelt: bytes, *, cut: bool) -> tuple[str, np.ndarray]:
    """Return the text of some bytes, and where each place between them is in the bytes of that text.

    What is no character is U+FFFD, and a place inside of it is where that ends. Where bytes were `cut`, a last
    character that is not finished is left out, and places in it are beyond the text's end.
    """
    parts, places, size = [], [0], 0
    while spelt:
        good, bad, unfinished = len(spelt), 0, False
        try:
            spelt.decode()
        except UnicodeDecodeError as error:
            good, bad = error.start, error.end - error.start
            unfinished = cut and error.reason == "unexpected end of data"
        parts.append(spelt[:good].decode())
        places.extend(range(size + 1, size + good + 1))
        size += good
        if bad and not unfinished:
            parts.append(REPLACED)
            size += len(REPLACED.encode())
        places.extend([size + unfinished] * bad)
        spelt = spelt[good + bad :]
    return "".join(parts), np.array(places, dtype=np.int64)


def adds_space(spelling: Spelling, before: str = "") -> bool:
    """Whether a tokenizer puts a space of its own before a text, here after `before`."""
    ids = [i for i in spelling.ids(f"{before}a") if i not in spelling.control]
    return (spelling.text(ids) or b"").startswith(b" ")
