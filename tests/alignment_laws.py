"""The laws of two readings of one text, checked without what is checked: from the text, in plain loops."""

import random
import unicodedata
from functools import cache
from typing import Any

PARTS = [
    *("  ", "    ", "\n\n\t", "\r\n", " ", "\t", "\u00a0", "\u2028", "\u3000", "\ufeff"),  # white space of all kinds
    *("e\u0301", "a\u0323\u0307", "\u0301", "\u0345", "ﬁ", "²", "ǆ", "Å", "ﾞ", "ｶﾞ", "가", "\u1112\u1161\u11ab", "क्षि"),
    *("👩‍🔬", "👨‍👩‍👧‍👦", "🇩🇪", "👍🏽", "\u200d", "\ufe0f", "\U0001d518\U0001d52b", "🙂"),
    *("שלום", "مرحبا", "\u202e", "漢字", "知识", "ナレ", "ไทย", "Größe", "İ", "ß", "\u03d2\u0301"),
    *("\0", "\x01", "\x7f", "\x85", "\u00ad", "\ufffd", "\U0010ffff"),
    *("<0x41>", "<0x0A>", "##a", "Ġ", "Ċ", "</", "<|", "▁", "▁▁a", "[UNK", "âĢ"),
    *("def f(x):\n    return x", " the", "The", "12", "3.14", "don't", "HELLO world", "a", "_x", "(", "=", "  # "),
]
"""What tokenizers read in ways of their own."""

SPECIAL = ["<eos>", "</s>", "<pad>", "<unk>", "[UNK]", "<|im_end|>", "<|im_start|>", "[INST]", "<s>", "<|user|>"]
"""What is text to one tokenizer and a special token to another."""


def random_text(source: random.Random, special: bool = False) -> str:
    """Return some of the parts, words, and characters from anywhere in Unicode."""
    choices = PARTS + SPECIAL if special else PARTS
    parts = []
    for _ in range(source.randint(0, 8)):
        kind = source.random()
        if kind < 0.6:
            parts.append(source.choice(choices))
        elif kind < 0.8:
            parts.append("".join(source.choice("abcdefghijkl  \n") for _ in range(source.randint(1, 8))))
        else:
            point = source.randrange(0x10FFFF - 0x800)
            parts.append(chr(point if point < 0xD800 else point + 0x800))
    return "".join(parts)


def faults(ours: Any, ids: list, chunks: Any, theirs: Any, their_ids: list, their_chunks: Any, text: str) -> list[str]:
    """Return what is wrong with the chunks of two readings of a text, all of whose tokens were aligned.

    `ours` and `theirs` are spellings. Empty also where nothing is aligned. What a tokenizer takes for a special token
    may be in no chunk, and SentencePiece puts a space after it.
    """
    plain = not any(token in text for token in SPECIAL)
    chunks, their_chunks = [int(c) for c in chunks], [int(c) for c in their_chunks]
    count = max(chunks, default=-1) + 1
    if count == 0:
        return [] if max(their_chunks, default=-1) < 0 else ["one side has chunks"]
    found = [f"{side} chunks are not consecutive" for side in _orders(chunks, their_chunks, count)]
    readings = [(ours, ids, chunks), (theirs, their_ids, their_chunks)]
    raw = text.encode()
    if all(spelling.text(some) == b" " + raw for spelling, some, _ in readings):
        raw = b" " + raw  # both write it
    ends = [_ends(*one, raw) if one[0].text(one[1]) in (raw, b" " + raw) else None for one in readings]
    found += [
        "a token is in no chunk" for one, end in zip(readings, ends, strict=True) if plain and end and -1 in one[2]
    ]
    if ends[0] and ends[1]:
        if _last(ends[0]) != _last(ends[1]):
            found.append("the sides of a chunk do not spell the same bytes")
        both = {end for end, _ in ends[0] if end > 0} & {end for end, _ in ends[1] if end > 0}
        if plain and ours.exact and theirs.exact and len(both) != count:
            found.append("a chunk could be smaller")
    elif ours.exact and theirs.exact:  # one of them has left something out, beside what it takes for a special token
        found += [f"{said} spell another thing" for said in _spelt_otherwise(readings, count, plain)]
    else:
        lossy, end = (readings[1], ends[0]) if ours.exact else (readings[0], ends[1])
        if end:
            found += [f"{where!r} is read otherwise" for where in _read_otherwise(*lossy, _last(end), raw)]
    return found


def _orders(chunks: list[int], their_chunks: list[int], count: int) -> list[str]:
    wrong = []
    for side, numbers in (("our", chunks), ("their", their_chunks)):
        kept = [number for number in numbers if number >= 0]
        if kept != sorted(kept) or sorted(set(kept)) != list(range(count)):
            wrong.append(side)
    return wrong


def _ends(spelling: Any, ids: list, chunks: list[int], raw: bytes) -> list[tuple[int, int]]:
    """Return where each token ends in the text, and its chunk."""
    end = len(raw) - sum(len(spelling.pieces[token]) for token in ids)
    ends = []
    for token, chunk in zip(ids, chunks, strict=True):
        end += len(spelling.pieces[token])
        ends.append((end, chunk))
    return ends


def _spelt_otherwise(readings: list, count: int, plain: bool) -> list[str]:
    """Return the chunks whose sides do not spell the same bytes, but for a space before the first one."""
    wrong = []
    for chunk in range(count):
        sides = []
        for spelling, ids, chunks in readings:
            pieces = [spelling.pieces[t] for t, c in zip(ids, chunks, strict=True) if c == chunk]
            spelt = None if None in pieces else b"".join(pieces).replace("▁".encode(), b" ")
            sides.append(spelt if plain or spelt is None else spelt.replace(b" ", b""))
        if None not in sides and sides[0] != sides[1]:
            short, long = sorted(sides, key=len)
            if chunk or long != b" " + short:
                wrong.append(f"{sides[0]!r} and {sides[1]!r}")
    return wrong


def _last(ends: list[tuple[int, int]]) -> dict[int, int]:
    return {chunk: end for end, chunk in ends if chunk >= 0}


def _read_otherwise(spelling: Any, ids: list, chunks: list[int], borders: dict[int, int], raw: bytes) -> list[str]:
    """Return what stands before a border, where it is not what the normalizer makes of the tokens before it."""
    normalize = spelling.tokenizer.backend_tokenizer.normalizer.normalize_str
    wrong = []
    for chunk, end in borders.items():
        before = ids[: len(chunks) - chunks[::-1].index(chunk)]
        if spelling.tokenizer.unk_token_id in before:
            break
        said = raw[:end].decode(errors="replace")
        read = b"".join(spelling.pieces[token] for token in before).decode()
        if _letters(normalize(said)) != _letters(read):
            wrong.append(said)
    return wrong


@cache
def _letters(text: str) -> str:
    return "".join(
        letter for letter in text if not letter.isspace() and letter != "▁" and unicodedata.category(letter) != "Cc"
    )
