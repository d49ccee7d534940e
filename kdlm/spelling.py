"""Spelling: the bytes of text that each token of a tokenizer stands for.

Two tokenizations of one text meet where their bytes do, so what is compared is bytes and never token strings:
byte-level BPE writes a leading space as one marker letter, SentencePiece as another, WordPiece not at all.
"""

import json
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Int
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

PROBE = """def step(x_0, *, lr=1e-3):\n\treturn x_0 - lr * grad  # 1234567 + 89 = ?\n\n
The quick brown fox's 3rd jump, "naïvely" RE-TRIED…  don't; it'll   cost €5,000.50!\r\n
Größe, où, año, ёжик, 知识蒸馏, 지식, ナレッジ, معرفة, ज्ञान, 🙂👩‍🔬 {"key": [null, -0.5]} <b>x²≤ﬁ</b> https://a.b/c?d=e&f"""
"""Text on which tokenizers of one vocabulary but other merges, normalisation or splitting come apart."""

SPACE = "\u2581"
"""What SentencePiece writes for a space."""


class Spelling:
    """What the tokens of a tokenizer spell.

    Attributes:
        pieces: the bytes of each id; None where they are not known (an unknown token, a row of padding).
        control: ids of tokens that are no text: ends of sequences and turns, padding.
        exact: whether the bytes of the tokens are those of the text that they were made of. False for a tokenizer
            that changes text before it reads it (lower case, NFKC, spaces left out).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder
        unknown: Any = tokenizer.unk_token_id
        special = {*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}
        self.control = frozenset(special - {unknown})
        self.pieces: list[bytes | None] = list(_pieces(tokenizer))
        for number, token in added.items():
            self.pieces[number] = token.content.encode()
        if isinstance(unknown, int):
            self.pieces[unknown] = None

    @cached_property
    def exact(self) -> bool:
        return self.text(self.ids(PROBE)) in (PROBE.encode(), b" " + PROBE.encode())

    @cached_property
    def lengths(self) -> Int[np.ndarray, "vocab"]:
        """The number of bytes that each id adds to a text; 0 for control tokens and those whose bytes are unknown."""
        known = enumerate(self.pieces)
        return np.array([0 if piece is None or i in self.control else len(piece) for i, piece in known])

    def ids(self, text: str) -> list[int]:
        """Return the tokens of a text, without any that the tokenizer adds of its own accord."""
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def text(self, ids: Sequence[int]) -> bytes | None:
        """Return the bytes that some tokens spell together; None where those of one are not known."""
        try:
            return b"".join([self.pieces[i] for i in ids])  # pyright: ignore[reportArgumentType]  the error is caught
        except (TypeError, IndexError):
            return None

    def ends(self, ids: Sequence[int]) -> Int[np.ndarray, "tokens"]:
        """Return where each token ends, in bytes from the first one's beginning."""
        return np.cumsum([len(self.pieces[i] or b"") for i in ids], dtype=np.int64)

    def ends_in(self, text: bytes, ids: Sequence[int]) -> Int[np.ndarray, "tokens"] | None:
        """Return where each token ends in a text that a tokenizer which is not exact has read.

        By the characters that the tokenizer says a token was made of; what it left out (spaces) belongs to the token
        after it. None where the text's tokens are others than these.
        """
        said = text.decode("utf-8", "replace")
        if said.encode() != text or not self.tokenizer.is_fast:
            return None
        read = self.tokenizer(said, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        if list(read["input_ids"]) != list(ids):
            return None
        spans = np.asarray(read["offset_mapping"], dtype=np.int64).reshape(-1, 2)
        ends = spans[:, 1].copy()
        for place in range(len(ends) - 2, -1, -1):  # tokens made of one character end together
            if spans[place + 1, 0] < ends[place]:
                ends[place] = ends[place + 1]
        ends = np.maximum.accumulate(ends)
        ends[-1:] = len(said)
        sizes = np.array([0, *(len(letter.encode()) for letter in said)], dtype=np.int64)
        return np.cumsum(sizes)[ends]


def _pieces(tokenizer: PreTrainedTokenizerBase) -> list[bytes | None]:
    """Return the bytes of every id, read from its token string in the way that the tokenizer's decoder does."""
    count = max(tokenizer.get_vocab().values(), default=-1) + 1
    tokens: list[str | None] = [None] * count
    for token, number in tokenizer.get_vocab().items():
        tokens[number] = token
    kinds = _decoders(tokenizer)
    if "ByteLevel" in kinds:
        letters = {letter: byte for byte, letter in bytes_to_unicode().items()}
        return [_mapped(token, letters) for token in tokens]
    regular = [token for i, token in enumerate(tokens) if token and i not in tokenizer.added_tokens_decoder]
    if all(len(token) == 1 and ord(token) < 256 for token in regular):  # ByT5: a letter is a byte
        return [bytes([ord(token)]) if token and len(token) == 1 else None for token in tokens]
    if "WordPiece" in kinds:
        return [None if token is None else _word_piece(token) for token in tokens]
    return [None if token is None else _sentence_piece(token, "ByteFallback" in kinds) for token in tokens]


def _decoders(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """Return the kinds of decoder that a fast tokenizer has, those of a sequence one by one; none for a slow one."""
    if not tokenizer.is_fast:
        return set()
    backend: Any = tokenizer.backend_tokenizer
    decoder = json.loads(backend.to_str()).get("decoder") or {}
    return {decoder.get("type"), *(one.get("type") for one in decoder.get("decoders", []))} - {None}


def _mapped(token: str | None, letters: dict[str, int]) -> bytes | None:
    if token is None or any(letter not in letters for letter in token):
        return None
    return bytes(letters[letter] for letter in token)


def _word_piece(token: str) -> bytes:
    return token[2:].encode() if token.startswith("##") else f" {token}".encode()


def _sentence_piece(token: str, bytes_too: bool) -> bytes:
    if bytes_too and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    return token.replace(SPACE, " ").encode()
