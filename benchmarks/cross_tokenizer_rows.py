"""The rows of cross_tokenizer_quality.py: one text, cut by bytes, as any of the models reads it.

A row is ROW bytes of one document, whatever the tokenizer. Its first PROMPT bytes or a few more are context, up to the
next place where no tokenizer has a token that goes across, and the rest is trained on and scored: the same bytes for
every student and for the teacher. No row ends with an end-of-sequence token, since it ends in the middle of a text.
"""

import json
import math
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from kdlm.data import Collator
from kdlm.data.alignment import Aligner
from kdlm.sandbox import SandboxData, SandboxModel
from kdlm.signal import IGNORE_INDEX
from kdlm.spelling import Spelling, spelling_of

ROW, PROMPT, SHORTEST = 384, 64, 128
TEACHER = "code-teacher-4k"
STUDENTS = {"unigram": "code-student-unigram", "bytes": "code-student-bytes", "4k": "code-student-4k"}
TEXTS = {"human": ("code", "train"), "teacher-made": ("code-written", "train"), "held out": ("code", "eval")}

Row = dict[str, Any]


@cache
def tokenizer(model: str) -> Any:
    return AutoTokenizer.from_pretrained(folder(model))


@cache
def folder(model: str) -> Path:
    return SandboxModel(model=model).resolve()  # type: ignore[arg-type]


@cache
def pieces(text: str) -> list[tuple[str, int]]:
    """Return the text of each row and how many of its bytes are context."""
    data, file = TEXTS[text]
    path = SandboxData(data=data, file=file).resolve()  # type: ignore[arg-type]
    spellings = [spelling_of(tokenizer(model)) for model in (TEACHER, STUDENTS["unigram"])]
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        for piece in cut(json.loads(line)["text"]):
            begin = border(piece, spellings)
            if begin is not None:
                found.append((piece, begin))
    return found


def cut(text: str) -> Iterator[str]:
    """Yield consecutive pieces of ROW bytes, up to 3 more where a letter takes several; none shorter than SHORTEST."""
    begin = size = 0
    for place, letter in enumerate(text):
        size += len(letter.encode())
        if size >= ROW:
            yield text[begin : place + 1]
            begin, size = place + 1, 0
    if size >= SHORTEST:
        yield text[begin:]


def border(piece: str, spellings: list[Spelling]) -> int | None:
    """Return the first byte from PROMPT on at which every tokenizer begins a token, and a letter begins."""
    shared = set()
    for number, spelling in enumerate(spellings):
        ids = spelling.ids(piece)
        spelt = spelling.text(ids) or b""
        lead = len(spelt) - len(piece.encode())  # SentencePiece puts a space before a text
        if lead < 0 or not spelt.endswith(piece.encode()):
            return None
        ends = {int(end) - lead for end in spelling.ends(ids)}
        shared = ends if not number else shared & ends
    size = len(piece.encode())
    letters = {0}
    for letter in piece:
        letters.add(max(letters) + len(letter.encode()))
    return min((end for end in shared & letters if PROMPT <= end < size), default=None)


def reading(model: str, piece: str, begin: int) -> Row:
    """Return a model's tokens of a row, and labels on those after its context."""
    spelling = _spelling(model)
    ids = spelling.ids(piece)
    lead = len(spelling.text(ids) or b"") - len(piece.encode())
    ends = spelling.ends(ids) - lead
    labels = [token if end > begin else IGNORE_INDEX for token, end in zip(ids, ends, strict=True)]
    return {"input_ids": ids, "labels": labels, "bytes": len(piece.encode()) - begin}


@cache
def _spelling(model: str) -> Spelling:
    return spelling_of(tokenizer(model))


@cache
def rows(student: str, text: str, both: bool) -> list[Row]:
    """Return the student's rows of a text; with `both` also the teacher's reading, aligned."""
    read = [reading(STUDENTS[student], *piece) for piece in pieces(text)]
    ours = [{**row, "index": number} for number, row in enumerate(read)]
    if not both:
        return ours
    align = Aligner(_spelling(STUDENTS[student]), _spelling(TEACHER))
    made = []
    for row, piece in zip(ours, pieces(text), strict=True):
        other = reading(TEACHER, *piece)
        chunks, theirs = align(row["input_ids"], row["labels"], other["input_ids"], other["labels"])
        beside: Row = {"their_ids": other["input_ids"], "their_labels": other["labels"], "their_chunks": theirs}
        made.append(row | {"chunks": chunks} | beside)
    return made


@cache
def held_out(name: str, every: int) -> list[Row]:
    """Return one row in `every` of the held-out text as a model reads it."""
    return [reading(name, *piece) for piece in pieces("held out")[::every]]


@torch.no_grad()
def bits_per_byte(model: Any, given: list[Row], without: int | None = None) -> float:
    """Return the bits that a model needs for each scored byte of some rows.

    `without` is a token that is taken away from all distributions: the end of a sequence, which no row has.
    """
    scored, total = 0, 0.0
    found = sorted(given, key=lambda row: len(row["input_ids"]))
    for start in range(0, len(found), 64):
        some = found[start : start + 64]
        scored += sum(row["bytes"] for row in some)
        batch = Collator(0)(some)
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        labels = batch["labels"][:, 1:]
        kept = labels != IGNORE_INDEX
        logits = logits[kept]
        if without is not None:
            logits[:, without] = -math.inf
        total += torch.nn.functional.cross_entropy(logits, labels[kept], reduction="sum").item()
    return total / math.log(2) / scored
