"""Formats: what a capture keeps of a teacher's distribution, and how it is written.

A *record* is what is kept of some rows: a dict of tensors, one row each. `observe` makes one from the teacher's signal,
`pack` turns one into columns of a shard, `raw` and `unpack` turn them back, `signal` is what the losses get.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Int
from pydantic import Field
from torch import Tensor

from kdlm.section import Section
from kdlm.signal import Dense, Draws, Head, Hidden, LogProbs, Sampled, Signal, TopK
from kdlm.store.draws import Record, counted, in_use, placed, widened
from kdlm.store.integers import Unpacker, from_gaps, gaps, pack

Columns = dict[str, Tensor]
"""Per-row tensors `[rows, ...]`, and `packed`, bytes that hold all rows of a sequence."""
Raw = dict[str, Any]
"""The numbers in the columns of a sequence, as arrays or tensors, before they mean anything."""
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

    def raw(self, columns: Columns, rows: int) -> Raw:
        """Return the columns of a sequence as numbers. Raises ValueError where they are damaged."""
        return columns

    def unpack(self, raws: Sequence[Raw]) -> Record:
        """Return what `pack` was given of several sequences, below one another, up to the stated error."""
        return {name: torch.cat([raw[name] for raw in raws]) for name in raws[0]}

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
    """The k most probable tokens, the exact log-sum-exp of the logits, the exact mass of the rest, and draws from it.

    Log-probabilities are rounded to multiples of `step` and scaled so that they and the tail add up to 1: each is off
    by at most `step` nats, and the reconstruction's KL to the truth is about `step`^2 / 24 at most.
    """

    kind: ClassVar = TopK
    made_from: ClassVar = frozenset({Dense, Hidden, TopK})
    name: Literal["top_k"] = "top_k"
    k: int = Field(128, ge=1)
    """Tokens per position."""
    tail_draws: int = Field(4, ge=0, le=65535)
    """Tokens drawn from the rest, which make forward KL unbiased: by the k tokens alone a student learns nothing of how
    the rest is spread."""
    step: float = Field(1 / 12, gt=0, le=1)
    """Rounding of log-probabilities, in nats; half of it costs one more bit for each token."""
    seed: int = 0
    """Seed of the draws."""

    def observe(self, signal: Signal, shared: Shared, labels: Tensor, generator: torch.Generator) -> Record:
        if not isinstance(signal, TopK):
            return super().observe(signal, shared, labels, generator)
        # From a server: no log-sum-exp, no draws, and as tail what the k tokens leave.
        log_probs, best = signal.log_probs.float().cpu().topk(self.k)
        order = signal.ids.cpu().gather(-1, best).argsort(-1)
        tail = torch.log(-torch.expm1(log_probs.double().logsumexp(-1).clamp(max=-1e-12))).float()
        ids = signal.ids.cpu().gather(-1, best)
        kept = {"ids": ids.gather(-1, order), "log_probs": log_probs.gather(-1, order), "log_tail": tail}
        return kept | _no_draws(len(ids))

    def _of_logits(self, z, labels, generator) -> Record:
        ids, logits = z
        lse = logits.logsumexp(-1, keepdim=True)
        top, places = logits.topk(self.k)
        others = logits.scatter(-1, places, -math.inf)
        rest = others.logsumexp(-1, keepdim=True)
        drawn = self._drawn(others - lse, rest - lse, generator)
        order = places.argsort(-1)
        places = places.gather(-1, order)
        return {
            "ids": (places if ids is None else ids[places]).cpu(),
            "log_probs": (top - lse).gather(-1, order).cpu(),
            "log_tail": (rest - lse).squeeze(-1).cpu(),
            "lse": lse.squeeze(-1).cpu(),
            **(drawn if ids is None else drawn | {"drawn_ids": ids.cpu()[drawn["drawn_ids"]]}),
        }

    def _drawn(self, logs: Tensor, rest: Tensor, generator: torch.Generator) -> Record:
        """Draw from the rest, whose log-probabilities these are; rows without one have no draws."""
        some = rest.isfinite().squeeze(-1)
        if not self.tail_draws or not some.any():
            return _no_draws(len(logs))
        p = (logs - rest).exp().masked_fill(~some[:, None], 1.0)
        drawn = torch.multinomial(p, self.tail_draws, replacement=True, generator=generator).sort(-1).values
        different = counted(drawn.cpu())
        ids, counts = different["ids"], different["counts"] * some.cpu()[:, None]
        found = logs.cpu().gather(-1, ids).masked_fill(counts == 0, 0.0)
        return {"drawn_ids": ids, "drawn_log_probs": found, "drawn_counts": counts}

    def pack(self, record: Record) -> Columns:
        counts = record["drawn_counts"].numpy().astype(np.int64)
        used = counts > 0
        drawn = [
            gaps(record["drawn_ids"].numpy())[used],
            counts[used] - 1,
            self._codes(record["drawn_log_probs"])[used],
        ]
        columns = [gaps(record["ids"].numpy()), self._codes(record["log_probs"]), used.sum(-1), *drawn]
        exact = {name: record[name].float() for name in ("log_tail", "lse") if name in record}
        return {"packed": _bytes(pack(columns)), **exact}

    def _codes(self, log_probs: Tensor) -> np.ndarray:
        return (log_probs.double().neg() / self.step).round().clamp(0, 0xFFFF).numpy().astype(np.int64)

    def raw(self, columns: Columns, rows: int) -> Raw:
        reader = Unpacker(columns["packed"].numpy().tobytes())
        table = {name: reader.column(rows * self.k).reshape(rows, self.k) for name in ("gaps", "codes")}
        table["distinct"] = reader.column(rows)
        total = int(table["distinct"].sum())
        drawn = {name: reader.column(total) for name in ("drawn_gaps", "drawn_counts", "drawn_codes")}
        return table | drawn | {name: values.numpy() for name, values in columns.items() if name != "packed"}

    def unpack(self, raws: Sequence[Raw]) -> Record:
        whole = {name: np.concatenate([raw[name] for raw in raws]) for name in raws[0]}
        log_probs = torch.from_numpy(whole["codes"].astype(np.float32)).mul_(-self.step)
        tail = torch.from_numpy(whole["log_tail"])
        kept = torch.log(-torch.expm1(tail.double().clamp(max=-1e-12))).float()[:, None]
        log_probs += kept - log_probs.logsumexp(-1, keepdim=True)
        used = in_use(whole["distinct"])
        left_out, counts, codes = (placed(whole[f"drawn_{name}"], used) for name in ("gaps", "counts", "codes"))
        return {
            "ids": torch.from_numpy(from_gaps(whole["gaps"])),
            "log_probs": log_probs,
            "log_tail": tail,
            **({"lse": torch.from_numpy(whole["lse"])} if "lse" in whole else {}),
            "drawn_ids": torch.from_numpy(np.where(used, from_gaps(left_out), 0)),
            "drawn_log_probs": torch.from_numpy(codes.astype(np.float32)) * -self.step,
            "drawn_counts": torch.from_numpy(np.where(used, counts + 1, 0).astype(np.float32)),
        }

    def joined(self, records: list[Record]) -> Record:
        return super().joined(widened(records, ("drawn_ids", "drawn_log_probs", "drawn_counts")))

    def signal(self, record: Record, head: Head | None) -> TopK:
        draws = Draws(record["drawn_ids"], record["drawn_log_probs"], record["drawn_counts"])
        return TopK(record["ids"], record["log_probs"], draws if self.tail_draws and bool(draws.counts.any()) else None)

    def row_bytes(self, hidden_size: int) -> float:
        return 2.2 * self.k + 3 * self.tail_draws + 8


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
        return counted(drawn.sort(-1).values.cpu())

    def pack(self, record: Record) -> Columns:
        ids, counts = record["ids"].numpy(), record["counts"].numpy().astype(np.int64)
        used = counts > 0
        # An id stands at the front of its row where it was drawn, so what is left out before it is a gap there too.
        return {"packed": _bytes(pack([used.sum(-1), gaps(ids)[used], counts[used] - 1]))}

    def raw(self, columns: Columns, rows: int) -> Raw:
        reader = Unpacker(columns["packed"].numpy().tobytes())
        distinct = reader.column(rows)
        total = int(distinct.sum())
        return {"distinct": distinct, "gaps": reader.column(total), "counts": reader.column(total)}

    def unpack(self, raws: Sequence[Raw]) -> Record:
        whole = {name: np.concatenate([raw[name] for raw in raws]) for name in raws[0]}
        used = in_use(whole["distinct"])
        left_out, counts = (placed(whole[name], used) for name in ("gaps", "counts"))
        ids, counts = np.where(used, from_gaps(left_out), 0), np.where(used, counts + 1, 0).astype(np.float32)
        return {"ids": torch.from_numpy(ids), "counts": torch.from_numpy(counts)}

    def joined(self, records: list[Record]) -> Record:
        return super().joined(widened(records, ("ids", "counts")))

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

    def unpack(self, raws: Sequence[Raw]) -> Record:
        whole = super().unpack(raws)
        return {"hidden": whole["hidden"].float() * whole["scale"][:, None]} if self.dtype == "float8" else whole

    def signal(self, record: Record, head: Head | None) -> Hidden:
        assert head is not None
        return Hidden(record["hidden"].to(head.weight.dtype), head)

    def row_bytes(self, hidden_size: int) -> float:
        return hidden_size * {"float32": 4, "bfloat16": 2, "float8": 1}[self.dtype]


class LogProbsFormat(Format):
    """Log-probabilities of the text itself: all that `alm` asks of a teacher; also to compare teachers, or texts."""

    kind: ClassVar = LogProbs
    made_from: ClassVar = frozenset({Dense, Hidden, LogProbs})
    name: Literal["logprobs"] = "logprobs"

    def observe(self, signal: Signal, shared: Shared, labels: Tensor, generator: torch.Generator) -> Record:
        if isinstance(signal, LogProbs):  # from a server
            return {"log_probs": signal.log_probs.float().cpu()}
        return super().observe(signal, shared, labels, generator)

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


def _no_draws(rows: int) -> Record:
    none = torch.zeros(rows, 1)
    return {"drawn_ids": none.long(), "drawn_log_probs": none, "drawn_counts": none}


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


def _bytes(packed: bytes) -> Tensor:
    return torch.frombuffer(bytearray(packed), dtype=torch.uint8)
