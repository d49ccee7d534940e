"""Formats: what a capture keeps of a teacher's distribution, and how it is written.

A *record* is what is kept of some rows: a dict of tensors, one row each. `observe` makes one from the teacher's signal,
`pack` and `unpack` turn one into columns of a shard and back, `signal` is what the losses get.
"""

import math
from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Int
from pydantic import Field
from torch import Tensor

from kdlm.section import Section
from kdlm.signal import Dense, Head, Hidden, LogProbs, Sampled, Signal, TopK
from kdlm.store.integers import Unpacker, from_gaps, gaps, pack

Record = dict[str, Tensor]
Columns = dict[str, Tensor]
"""Per-row tensors `[rows, ...]`, and `packed`, bytes that hold all rows of a sequence."""
Shared = int | Int[Tensor, "shared"]
"""Ids that student and teacher share: the first n, or a rising list."""

_LOGITS = 1 << 26
"""Logits of the rows that are looked at together, 256 MiB in fp32."""


class Format(Section):
    """What is kept of each row."""

    kind: ClassVar[type]
    """The signal it gives back."""
    made_from: ClassVar[frozenset[type]] = frozenset({Dense, Hidden})
    """The signals it can be made from."""

    def observe(self, signal: Signal, shared: Shared, labels: Tensor, generator: torch.Generator) -> Record:
        """Return what is kept of the teacher's rows, on the CPU; only `shared` ids have any probability.

        Raises ValueError for a signal it cannot be made from.
        """
        if not isinstance(signal, Dense | Hidden):
            raise ValueError(f"format: {type(self).__name__} cannot be made from a {type(signal).__name__} signal")
        parts = [
            self._of_logits(ids_and_logits, labels[at], generator) for at, ids_and_logits in _blocks(signal, shared)
        ]
        return self.joined(parts)

    def _of_logits(self, z: tuple[Tensor | None, Tensor], labels: Tensor, generator: torch.Generator) -> Record:
        raise NotImplementedError

    def pack(self, record: Record) -> Columns:
        """Return the columns of one sequence."""
        return record

    def unpack(self, columns: Columns, rows: int) -> Record:
        """Return what `pack` was given, up to the stated error."""
        return columns

    def joined(self, records: list[Record]) -> Record:
        """Return the records below one another."""
        return {name: torch.cat([record[name] for record in records]) for name in records[0]}

    def signal(self, record: Record, head: Head | None) -> Signal:
        """Return what the losses get."""
        raise NotImplementedError

    def row_bytes(self, hidden_size: int) -> float:
        """Estimate the bytes of a row, to cut shards of a size."""
        raise NotImplementedError


class TopKFormat(Format):
    """The k most probable tokens, the exact log-sum-exp of the logits and the exact mass of the rest.

    Log-probabilities are rounded to multiples of `step` and scaled so that they and the tail add up to 1: each is off
    by at most `step` nats, and the reconstruction's KL to the truth is about `step`^2 / 24 at most.
    """

    kind: ClassVar = TopK
    made_from: ClassVar = frozenset({Dense, Hidden, TopK})
    name: Literal["top_k"] = "top_k"
    k: int = Field(128, ge=1)
    """Tokens per position."""
    step: float = Field(1 / 16, gt=0, le=1)
    """Rounding of log-probabilities, in nats; half of it costs one more bit for each token."""

    def observe(self, signal: Signal, shared: Shared, labels: Tensor, generator: torch.Generator) -> Record:
        if not isinstance(signal, TopK):
            return super().observe(signal, shared, labels, generator)
        # From a server: its log-sum-exp is not known, and the tail is what the k tokens leave.
        log_probs, best = signal.log_probs.float().cpu().topk(self.k)
        order = signal.ids.cpu().gather(-1, best).argsort(-1)
        tail = torch.log(-torch.expm1(log_probs.double().logsumexp(-1).clamp(max=-1e-12))).float()
        ids = signal.ids.cpu().gather(-1, best)
        return {"ids": ids.gather(-1, order), "log_probs": log_probs.gather(-1, order), "log_tail": tail}

    def _of_logits(self, z, labels, generator) -> Record:
        ids, logits = z
        lse = logits.logsumexp(-1, keepdim=True)
        top, places = logits.topk(self.k)
        rest = logits.scatter(-1, places, -math.inf).logsumexp(-1, keepdim=True)
        order = places.argsort(-1)
        places = places.gather(-1, order)
        return {
            "ids": (places if ids is None else ids[places]).cpu(),
            "log_probs": (top - lse).gather(-1, order).cpu(),
            "log_tail": (rest - lse).squeeze(-1).cpu(),
            "lse": lse.squeeze(-1).cpu(),
        }

    def pack(self, record: Record) -> Columns:
        codes = (record["log_probs"].double().neg() / self.step).round().clamp(0, 0xFFFF).numpy()
        packed = _bytes(pack([gaps(record["ids"].numpy()), codes]))
        exact = {name: record[name].float() for name in ("log_tail", "lse") if name in record}
        return {"packed": packed, **exact}

    def unpack(self, columns: Columns, rows: int) -> Record:
        reader, k = Unpacker(columns["packed"].numpy().tobytes()), self.k
        ids = from_gaps(reader.column(rows * k).reshape(rows, k))
        log_probs = torch.from_numpy(reader.column(rows * k).reshape(rows, k).astype(np.float32)) * -self.step
        tail = columns["log_tail"]
        kept = torch.log(-torch.expm1(tail.double().clamp(max=-1e-12))).float()[:, None]
        log_probs += kept - log_probs.logsumexp(-1, keepdim=True)
        exact = {name: value for name, value in columns.items() if name != "packed"}
        return {"ids": torch.from_numpy(ids), "log_probs": log_probs, **exact}

    def signal(self, record: Record, head: Head | None) -> TopK:
        return TopK(record["ids"], record["log_probs"])

    def row_bytes(self, hidden_size: int) -> float:
        return 2.2 * self.k + 8


class SampledFormat(Format):
    """Tokens drawn from the teacher, with how often each was (random-sampling KD, arXiv 2503.16870).

    Drawn from the teacher's own distribution at temperature 1, once: shares of draws are unbiased, and every epoch sees
    the same draws. `draws` of 50 give about a dozen different tokens a position where the teacher is as sure as usual.
    """

    kind: ClassVar = Sampled
    name: Literal["sampled"] = "sampled"
    draws: int = Field(50, ge=1, le=65535)
    """Tokens drawn per position, with replacement."""
    seed: int = 0
    """Seed of the draws."""

    def _of_logits(self, z, labels, generator) -> Record:
        ids, logits = z
        drawn = torch.multinomial(logits.softmax(-1), self.draws, replacement=True, generator=generator)
        drawn = drawn if ids is None else ids[drawn]
        return _counted(drawn.sort(-1).values.cpu())

    def pack(self, record: Record) -> Columns:
        ids, counts = record["ids"].numpy(), record["counts"].numpy().astype(np.int64)
        used = counts > 0
        # An id stands at the front of its row where it was drawn, so what is left out before it is a gap there too.
        return {"packed": _bytes(pack([used.sum(-1), gaps(ids)[used], counts[used] - 1]))}

    def unpack(self, columns: Columns, rows: int) -> Record:
        reader = Unpacker(columns["packed"].numpy().tobytes())
        distinct = reader.column(rows).astype(np.int64)
        total = int(distinct.sum())
        used = np.arange(max(1, distinct.max(initial=0)))[None] < distinct[:, None]
        left_out, counts = np.zeros(used.shape, np.int64), np.zeros(used.shape, np.float32)
        left_out[used], counts[used] = reader.column(total), reader.column(total).astype(np.float32) + 1
        return {"ids": torch.from_numpy(np.where(used, from_gaps(left_out), 0)), "counts": torch.from_numpy(counts)}

    def joined(self, records: list[Record]) -> Record:
        width = max(record["ids"].shape[1] for record in records)
        pad = torch.nn.functional.pad
        return super().joined([{n: pad(x, (0, width - x.shape[1])) for n, x in record.items()} for record in records])

    def signal(self, record: Record, head: Head | None) -> Sampled:
        return Sampled(record["ids"], record["counts"])

    def row_bytes(self, hidden_size: int) -> float:
        return min(2.5 * self.draws, 40)


class HiddenFormat(Format):
    """Last hidden states; the head is stored once. Exact over the whole vocabulary, so every divergence works."""

    kind: ClassVar = Hidden
    made_from: ClassVar = frozenset({Hidden})
    name: Literal["hidden"] = "hidden"
    dtype: Literal["float32", "bfloat16", "float8"] = "bfloat16"
    """How a state is stored: `bfloat16` is exact for a bfloat16 teacher; `float8` (e4m3, scaled by row) halves it."""

    def observe(self, signal: Signal, shared: Shared, labels: Tensor, generator: torch.Generator) -> Record:
        if not isinstance(signal, Hidden):
            raise ValueError("format: hidden cannot be had: this teacher's logits are not head(hidden); use top_k")
        return {"hidden": signal.hidden.cpu()}

    def pack(self, record: Record) -> Columns:
        hidden = record["hidden"]
        if self.dtype != "float8":
            return {"hidden": hidden.to(getattr(torch, self.dtype))}
        scale = hidden.float().abs().amax(-1).clamp(min=1e-12) / _FLOAT8_MAX
        return {"hidden": (hidden.float() / scale[:, None]).to(torch.float8_e4m3fn), "scale": scale}

    def unpack(self, columns: Columns, rows: int) -> Record:
        if self.dtype != "float8":
            return columns
        return {"hidden": columns["hidden"].float() * columns["scale"][:, None]}

    def signal(self, record: Record, head: Head | None) -> Hidden:
        assert head is not None
        return Hidden(record["hidden"].to(head.weight.dtype), head)

    def row_bytes(self, hidden_size: int) -> float:
        return hidden_size * {"float32": 4, "bfloat16": 2, "float8": 1}[self.dtype]


class LogProbsFormat(Format):
    """Log-probabilities of the text itself: for comparing teachers and texts, and across tokenizers."""

    kind: ClassVar = LogProbs
    name: Literal["logprobs"] = "logprobs"

    def _of_logits(self, z, labels, generator) -> Record:
        ids, logits = z
        places = labels if ids is None else torch.searchsorted(ids, labels).clamp(max=len(ids) - 1)
        known = labels < logits.shape[-1] if ids is None else ids[places] == labels
        found = logits.gather(-1, places.clamp(max=logits.shape[-1] - 1)[:, None]).squeeze(-1) - logits.logsumexp(-1)
        return {"log_probs": torch.where(known, found, -math.inf).cpu()}

    def signal(self, record: Record, head: Head | None) -> LogProbs:
        return LogProbs(record["log_probs"])

    def row_bytes(self, hidden_size: int) -> float:
        return 4


AnyFormat = Annotated[TopKFormat | SampledFormat | HiddenFormat | LogProbsFormat, Field(discriminator="name")]

_FLOAT8_MAX = 448.0
"""The largest number of float8 e4m3."""


def _blocks(signal: Dense | Hidden, shared: Shared) -> Iterator[tuple[slice, tuple[Tensor | None, Tensor]]]:
    """Yield, for a few rows at a time, the fp32 logits of the shared ids; and these ids where they are a list."""
    rows, vocab = (
        (len(signal.hidden), signal.head.vocab_size) if isinstance(signal, Hidden) else tuple(signal.logits.shape)
    )
    step = max(1, _LOGITS // vocab)
    for start in range(0, max(rows, 1), step):
        at = slice(start, start + step)
        if isinstance(signal, Hidden):
            head = signal.head.cut(shared) if isinstance(shared, int) else signal.head
            logits = head.logits(signal.hidden[at])
        else:
            logits = signal.logits[at]
        if isinstance(shared, int):
            yield at, (None, logits[:, :shared].float())
        else:
            ids = shared.to(logits.device)
            yield at, (ids, logits.index_select(-1, ids).float())


def _counted(drawn: Tensor) -> Record:
    """Return the different ids of each row of sorted draws, in front and ascending, and how often each occurs."""
    rows, draws = drawn.shape
    first = torch.ones_like(drawn, dtype=torch.bool)
    first[:, 1:] = drawn[:, 1:] != drawn[:, :-1]
    place = first.cumsum(-1) - 1
    counts = torch.zeros(rows, draws).scatter_add_(1, place, torch.ones(rows, draws))
    ids = torch.zeros_like(drawn).scatter_(1, place, drawn)
    width = max(1, int(place.max()) + 1) if drawn.numel() else 1
    return {"ids": ids[:, :width], "counts": counts[:, :width]}


def _bytes(packed: bytes) -> Tensor:
    return torch.frombuffer(bytearray(packed), dtype=torch.uint8)
