"""What `kdlm serve` and the teacher `served` say to each other: safetensors, written and read here for both ends.

A question is sequences laid end to end and the positions that are asked about. The answer to `/v1/hidden` is the last
hidden state of each of these positions, in the model's own data type; the head, the same for all of them, is a file
of its own that is fetched once. So a row costs `2 * hidden_size` bytes and every divergence over the whole vocabulary
stays exact. `/v1/scores` asks for log-probabilities of named ids instead.

What comes from outside is checked before it is used: names, types, shapes, ranges, and that the parts fit.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import safetensors.torch
import torch
from jaxtyping import Int
from safetensors import safe_open
from torch import Tensor

from kdlm.signal import Head

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_BODY = 16 << 20
"""Most bytes of a request: 4 million token ids."""
MAX_HEADER = 4096
"""Most bytes of the safetensors header of a request: it names at most four tensors."""
MEDIA_TYPE = "application/octet-stream"


class WireError(ValueError):
    """A body that cannot be read (400), or that asks for what cannot be answered (422)."""

    def __init__(self, message: str, status: int = 400):
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Question:
    """Sequences and the positions that are asked about.

    Attributes:
        ids: the token ids of all sequences, laid end to end.
        lengths: how many of them each sequence has.
        rows: positions in `ids`, strictly ascending. The answer at a position speaks of the token after it.
        asked: ids whose log-probability is asked for at each row; None asks for hidden states.
    """

    ids: Int[Tensor, "tokens"]
    lengths: Int[Tensor, "sequences"]
    rows: Int[Tensor, "rows"]
    asked: Int[Tensor, "rows k"] | None = None

    @property
    def tokens(self) -> int:
        return len(self.ids)

    def sequences(self) -> "list[tuple[Int[Tensor, 'length'], Int[Tensor, 'kept']]]":
        """Return each sequence's ids, and the asked positions in it."""
        ends = self.lengths.cumsum(0)
        firsts = torch.searchsorted(self.rows, ends - self.lengths).tolist()
        lasts = torch.searchsorted(self.rows, ends).tolist()
        bounds = zip((ends - self.lengths).tolist(), ends.tolist(), firsts, lasts, strict=True)
        return [(self.ids[start:end], self.rows[first:last] - start) for start, end, first, last in bounds]

    def split(self, tokens: int) -> "list[Question]":
        """Return questions of whole sequences with at most `tokens` tokens, or one sequence, each.

        Together they have the rows of this one, in its order; sequences without a row are left out. Not for `asked`.
        """
        parts: list[list[tuple[Tensor, Tensor]]] = []
        size = 0
        for ids, rows in self.sequences():
            if not len(rows):
                continue
            if not parts or size + len(ids) > tokens:
                parts.append([])
                size = 0
            parts[-1].append((ids, rows + size))
            size += len(ids)
        return [
            Question(
                torch.cat([ids for ids, _ in part]),
                torch.tensor([len(ids) for ids, _ in part]),
                torch.cat([rows for _, rows in part]),
            )
            for part in parts
        ]


@dataclass(frozen=True)
class Limits:
    """What a server answers.

    Attributes:
        input_ids: token ids below this can be read.
        scored_ids: token ids below this have a score: the rows of the head.
        max_length: most tokens of a sequence.
        max_tokens: most tokens of a question.
    """

    input_ids: int
    scored_ids: int
    max_length: int
    max_tokens: int

    def max_body(self, *, scores: bool) -> int:
        """Return the most bytes of a request: asked ids may be many, all else is at most 8 bytes a token, thrice."""
        return MAX_BODY if scores else min(MAX_BODY, 24 * self.max_tokens + MAX_HEADER)


def encode_question(question: Question) -> bytes:
    """Return a question as the body of a request."""
    parts = {"ids": question.ids, "lengths": question.lengths, "rows": question.rows}
    if question.asked is not None:
        parts["asked"] = question.asked
    return safetensors.torch.save({name: part.to(torch.int32).contiguous() for name, part in parts.items()})


def decode_question(body: bytes, limits: Limits, *, scores: bool) -> Question:
    """Read the body of a request; `scores` says whether ids are asked for.

    Raises WireError: whatever is wrong with it, in words for the person who sent it.
    """
    parts = decode(body, max_header=MAX_HEADER)
    names = {"ids", "lengths", "rows"} | ({"asked"} if scores else set())
    if parts.keys() != names:
        raise WireError(f"expected the tensors {', '.join(sorted(names))}, got {', '.join(sorted(parts)) or 'none'}")
    for name, part in parts.items():
        dims = 2 if name == "asked" else 1
        if part.dtype not in (torch.int32, torch.int64) or part.dim() != dims:
            raise WireError(f"{name}: expected int32 or int64 of {dims} dimension(s), got {part.dtype} of {part.dim()}")
    parts = {name: part.to(torch.int64) for name, part in parts.items()}
    _check(limits, **parts)
    return Question(**parts)


def _check(limits: Limits, ids: Tensor, lengths: Tensor, rows: Tensor, asked: Tensor | None = None) -> None:
    if not len(lengths) or not len(rows):
        raise WireError("a question has at least one sequence and one row", 422)
    if len(ids) > limits.max_tokens:
        raise WireError(f"{len(ids)} tokens; this server takes {limits.max_tokens} in a request: send fewer", 422)
    _in_range("lengths", lengths, 1, limits.max_length, "the longest sequence that this model reads")
    if int(lengths.sum()) != len(ids):
        raise WireError(f"lengths: they sum to {int(lengths.sum())}, and there are {len(ids)} ids", 422)
    _in_range("ids", ids, 0, limits.input_ids - 1, "the last id that this model reads")
    _in_range("rows", rows, 0, len(ids) - 1, "the last position")
    if not bool((rows[1:] > rows[:-1]).all()):
        raise WireError("rows: expected strictly ascending positions", 422)
    if asked is not None:
        if len(asked) != len(rows) or not asked.shape[1]:
            raise WireError(
                f"asked: expected [{len(rows)}, at least 1] as there are rows, got {list(asked.shape)}", 422
            )
        _in_range("asked", asked, 0, limits.scored_ids - 1, "the last id that this model scores")


def _in_range(name: str, values: Tensor, least: int, most: int, what: str) -> None:
    low, high = int(values.min()), int(values.max())
    if low < least or high > most:
        raise WireError(f"{name}: {low if low < least else high} is not in {least}..{most} ({what})", 422)


def encode_answer(parts: Mapping[str, Tensor], head: str) -> bytes:
    """Return an answer as the body of a response; `head` is the digest of the head that goes with it."""
    tensors = {name: part.detach().cpu().contiguous() for name, part in parts.items()}
    return safetensors.torch.save(tensors, metadata={"head": head})


def decode_answer(body: bytes) -> tuple[dict[str, Tensor], str]:
    """Read the body of a response: its tensors and the digest of the head. Raises WireError when it is damaged."""
    parts = decode(body)
    size = int.from_bytes(body[:8], "little")
    return parts, json.loads(body[8 : 8 + size]).get("__metadata__", {}).get("head", "")


def decode(body: bytes, *, max_header: int = 1 << 20) -> dict[str, Tensor]:
    """Read safetensors that came over a line, on the CPU. Raises WireError for whatever is wrong with them."""
    if len(body) < 8 or int.from_bytes(body[:8], "little") > max_header:
        raise WireError("the body is not safetensors: no header")
    try:
        return safetensors.torch.load(body)
    except Exception as error:  # besides its own error the library lets KeyError, AssertionError ... through
        raise WireError(f"the body is not safetensors, or damaged: {error}") from error


def write_head(head: Head, path: Path) -> str:
    """Write a head as a file that is served as it is; return its digest, the same whenever the head is the same."""
    tensors = {"weight": head.weight.detach().cpu().contiguous()}
    if head.bias is not None:
        tensors["bias"] = head.bias.detach().cpu().contiguous()
    numbers = json.dumps({"logit_scale": head.logit_scale, "softcap": head.softcap})
    safetensors.torch.save_file(tensors, path, metadata={"head": numbers})  # one entry: several come in any order
    return digest_of(path)


def read_head(path: Path, device: torch.device) -> Head:
    """Open a head that `write_head` wrote. Raises WireError when it is none."""
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            numbers = json.loads((file.metadata() or {})["head"])
            bias = file.get_tensor("bias") if "bias" in file.keys() else None
            return Head(file.get_tensor("weight"), bias, numbers["logit_scale"], numbers["softcap"])
    except Exception as error:  # see `decode`
        raise WireError(f"the head is not what was expected: {error}") from error


def digest_of(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def vocabulary_digest(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Return a name for what a tokenizer's ids mean: equal where all tokens have equal ids."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()
