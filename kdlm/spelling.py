"""Spelling: the bytes of text that each token of a tokenizer stands for.

Two tokenizations of one text meet where their bytes do, so what is compared is bytes and never token strings:
byte-level BPE writes a leading space as one marker letter, SentencePiece as another, WordPiece not at all.
"""

import json
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from functools import cache, cached_property, lru_cache
from typing import Any

import numpy as np
from jaxtyping import Bool, Int
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

PROBE = """def step(x_0, *, lr=1e-3):\n\treturn x_0 - lr * grad  # 1234567 + 89 = ?\n\n
The quick brown fox's 3rd jump, "naïvely" RE-TRIED…  don't; it'll   cost €5,000.50!\r\n
Größe, où, año, ёжик, 知识蒸馏, 지식, ナレッジ, معرفة, ज्ञान, 🙂👩‍🔬 {"key": [null, -0.5]} <b>x²≤ﬁ</b> https://a.b/c?d=e&f"""
"""Text on which tokenizers of one vocabulary but other merges, normalisation or splitting come apart."""

SPACE = "\u2581"
"""What SentencePiece writes for a space."""

Ids = Sequence[int] | np.ndarray


@lru_cache(maxsize=8)
def spelling_of(tokenizer: PreTrainedTokenizerBase) -> "Spelling":
    """Return the spelling of a tokenizer, the same one at every call: a large vocabulary takes a second to read."""
    return Spelling(tokenizer)


class Spelling:
    """What the tokens of a tokenizer spell.

    Attributes:
        pieces: the bytes of each id; None where they are not known (an unknown token, a row of padding).
        control: ids of tokens that are no text: ends of sequences and turns, padding. Their bytes are those of their
            names, for where one stands in the middle of a text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder
        unknown = _unknown(tokenizer)
        special = {*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}
        self.control = frozenset(special - {unknown})
        self.pieces: list[bytes | None] = list(_pieces(tokenizer))
        for number, token in added.items():
            self.pieces[number] = token.content.encode()
        if unknown is not None:
            self.pieces[unknown] = None

    def __reduce__(self):  # a data loader's worker reads the vocabulary again, once, instead of being sent it
        return spelling_of, (self.tokenizer,)

    @cached_property
    def exact(self) -> bool:
        """Whether tokens spell the text that they were made of; False where a tokenizer changes text before it reads
        it (lower case, NFKC, spaces left out). Judged by one text: another one may hold letters that are changed."""
        return self.text(self.ids(PROBE)) in (PROBE.encode(), b" " + PROBE.encode())

    @cached_property
    def begins_with_space(self) -> bool:
        """Whether the tokenizer puts a space before a text, as SentencePiece does."""
        return self.text(self.ids("a")) == b" a"

    @cached_property
    def lengths(self) -> Int[np.ndarray, "vocab"]:
        """The number of bytes that each id adds to a text; 0 for control tokens and those whose bytes are unknown."""
        return np.where(self._control, 0, self._sizes)[:-1]

    # Tables by id; the last place is for ids that the tokenizer does not have, such as rows that pad a head.

    @cached_property
    def _table(self) -> np.ndarray:
        table = np.empty(len(self.pieces) + 1, dtype=object)
        table[:-1] = self.pieces
        return table

    @cached_property
    def _sizes(self) -> np.ndarray:
        return np.array([*(len(piece or b"") for piece in self.pieces), 0], dtype=np.int64)

    @cached_property
    def _control(self) -> np.ndarray:
        table = np.zeros(len(self.pieces) + 1, dtype=bool)
        table[list(self.control)] = True
        return table

    def _places(self, ids: Ids) -> np.ndarray:
        return np.minimum(np.asarray(ids, dtype=np.int64), len(self.pieces))

    def ids(self, text: str) -> list[int]:
        """Return the tokens of a text, without any that the tokenizer adds of its own accord."""
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def text(self, ids: Ids) -> bytes | None:
        """Return the bytes that some tokens spell together; None where those of one are not known."""
        try:
            return b"".join(self._table[self._places(ids)].tolist())
        except TypeError:
            return None

    def known(self, ids: Ids) -> int:
        """Return how many tokens, from the first one on, are known bytes."""
        unknown = np.flatnonzero([piece is None for piece in self._table[self._places(ids)]])
        return int(unknown[0]) if len(unknown) else len(ids)

    def is_control(self, ids: Ids) -> Bool[np.ndarray, "tokens"]:
        """Return which tokens are control tokens."""
        return self._control[self._places(ids)]

    def count(self, ids: Ids) -> int:
        """Return how many bytes of text some tokens spell; control tokens and unknown ones spell none."""
        places = self._places(ids)
        return int(self._sizes[places][~self._control[places]].sum())

    def ends(self, ids: Ids) -> Int[np.ndarray, "tokens"]:
        """Return where each token ends, in bytes from the first one's beginning."""
        return np.cumsum(self._sizes[self._places(ids)])

    def ends_in(self, text: bytes, ids: Ids) -> Int[np.ndarray, "tokens"] | None:
        """Return where each token ends in a text whose tokens spell it otherwise than it is, in bytes.

        By the characters that the tokenizer says a token was made of. What it left out belongs to the token before
        (an accent), white space to the one after it. Tokens made of the same characters, or with a border inside of
        what a normaliser may compose, end together; beyond the text where not all of them are given. None unless the
        tokenizer reads the text as these tokens, or as these and more.
        """
        said = text.decode("utf-8", "replace")
        if said.encode() != text or not self.tokenizer.is_fast:
            return None
        read = self.tokenizer(said, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        if not np.array_equal(read["input_ids"][: len(ids)], np.asarray(ids)):
            return None
        begins, ends = np.asarray(read["offset_mapping"], dtype=np.int64).reshape(-1, 2).T
        if not len(ends):
            return ends
        ends = _with_left_out(said, np.maximum.accumulate(ends), begins)
        later = np.append(np.minimum.accumulate(begins[::-1])[::-1][1:], len(said))
        border = ends <= later
        if not said.isascii():
            border &= ~np.isin(ends, [place for place, letter in enumerate(said) if _joins(letter)])
        border[-1] = True
        places = np.flatnonzero(border)
        last = places[np.searchsorted(places, np.arange(len(ids)))]  # of the tokens that end together with each
        letters = np.frombuffer(text, dtype=np.uint8) & 0xC0 != 0x80  # where a character begins
        found = np.append(np.flatnonzero(letters), len(text))[ends[last]]
        return np.where(last < len(ids), found, len(text) + 1)


def _with_left_out(text: str, ends: np.ndarray, begins: np.ndarray) -> np.ndarray:
    """Put the end of each token behind what was left out after it, up to white space; the last one's at the text's."""
    following = np.append(begins[1:], len(text))
    for place in np.flatnonzero(ends < following).tolist():
        end = ends[place]
        while end < following[place] and not text[end].isspace():
            end += 1
        ends[place] = end
    ends[-1] = len(text)
    return np.maximum.accumulate(ends)


@cache
def _joins(letter: str) -> bool:
    """Whether a normaliser may compose a letter with the one before it: accents, vowel signs, Hangul's later parts."""
    if letter < "\u0300":
        return False
    first = unicodedata.normalize("NFKC", letter)[:1]
    return unicodedata.category(first).startswith("M") or "\u1160" <= first <= "\u11ff"


def _unknown(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the id that stands for any text; none where the role's token has another one, as GPT-2's has."""
    number: Any = tokenizer.unk_token_id
    return None if number in (tokenizer.eos_token_id, tokenizer.bos_token_id) else number


def _pieces(tokenizer: PreTrainedTokenizerBase) -> Iterator[bytes | None]:
    """Yield the bytes of every id, read from its token string in the way that the tokenizer's decoder does."""
    numbers = tokenizer.get_vocab()
    tokens: list[str | None] = [None] * (max(numbers.values(), default=-1) + 1)
    for token, number in numbers.items():
        tokens[number] = token
    spelt = _reader_of(tokenizer, tokens)
    return (None if token is None else spelt(token) for token in tokens)


def _reader_of(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str | None]) -> Callable[[str], bytes | None]:
    """Return what reads a token's bytes from its string."""
    kinds = _decoders(tokenizer)
    if "ByteLevel" in kinds:
        letters = {letter: byte for byte, letter in bytes_to_unicode().items()}
        return lambda token: _mapped(token, letters)
    if "WordPiece" in kinds:
        return _word_piece
    if not tokenizer.is_fast and {chr(byte) for byte in range(256)} <= set(tokens):  # ByT5
        letters = {chr(byte): byte for byte in range(256)}
        return lambda token: _mapped(token, letters)
    byte_fallback = "ByteFallback" in kinds or not tokenizer.is_fast
    return lambda token: _sentence_piece(token, byte_fallback)


def _decoders(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """Return the kinds of decoder that a fast tokenizer has, those of a sequence one by one; none for a slow one."""
    if not tokenizer.is_fast:
        return set()
    backend: Any = tokenizer.backend_tokenizer
    decoder = {} if backend.decoder is None else json.loads(backend.decoder.__getstate__())
    return {decoder.get("type"), *(one.get("type") for one in decoder.get("decoders", []))} - {None}


def _mapped(token: str, letters: dict[str, int]) -> bytes | None:
    try:
        return bytes([letters[letter] for letter in token])
    except KeyError:
        return None


def _word_piece(token: str) -> bytes:
    return token[2:].encode() if token.startswith("##") else f" {token}".encode()


def _sentence_piece(token: str, byte_fallback: bool) -> bytes:
    if byte_fallback and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    return token.replace(SPACE, " ").encode()
