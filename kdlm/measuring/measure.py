"""measure: the figures of a student beside its teacher, over rows of any data."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from kdlm.data import Prefetched, collator_for
from kdlm.data.load import text_collator
from kdlm.measuring.derived import DRAFTED
from kdlm.measuring.reading import Reader, Reading
from kdlm.measuring.tally import Measured, Tally
from kdlm.models import evaluating
from kdlm.signal import sequence_of


def measure(
    student: Any,
    teacher: Any,
    rows: Iterable[dict[str, Any]],
    tokenizer: Any = None,
    *,
    their_tokenizer: Any = None,
    start: Any = None,
    baseline: Any = None,
    names: Sequence[str] | None = None,
    vocab: int | Tensor | None = None,
    collate: Callable[[Sequence[dict[str, Any]]], dict[str, Any]] | None = None,
    documents: Int[np.ndarray, "sequences"] | None = None,
    batch_size: int = 8,
    limit: int | None = None,
    drafted: int = DRAFTED,
    **options: Any,
) -> Measured:
    """Return what a student keeps of its teacher on some rows: figures with standard errors over documents.

    Args:
        student: a language model, on the device that is measured on; left in the modes that it was in.
        teacher: a `kdlm.teachers.Teacher` (local, cached, served ...), a model, which is frozen, or None.
        rows: with `input_ids` and `labels`, as `kdlm.data.load_data` gives them, packed or not: only tokens with a
            label count.
        tokenizer: the student's; without it nothing is said per byte.
        their_tokenizer: the teacher's, for rows of two readings.
        start: the student before training, for `kl_to_start` (forgetting) and `gap_closed`.
        baseline: a student trained without the teacher, which `gap_closed` then is measured from.
        names: the measures of each token (docs/metrics.md); by default all that this teacher can give.
        vocab: ids that both tokenizers share; by default those of the smaller head.
        collate: rows -> batch; by default what fits the rows.
        documents: the document that a row's `index` is a piece of (`Data.documents`); by default each row is one.
        batch_size: rows of one forward pass.
        limit: only so many rows, the first.
        drafted: tokens of a block, for `block_efficiency`.
        options: `chunk_rows` and `impl` of `kdlm.losses.weighted_sum`.

    Every figure is a sum over all kept tokens, divided once: batches, padding, packing and order change none. Logits
    are in memory a chunk at a time. Raises ValueError for a student that is no language model, for a measure that is
    unknown or that the teacher cannot give, and for rows without a token that counts.
    """
    reader = Reader(
        student,
        teacher,
        start=start,
        baseline=baseline,
        names=names,
        vocab=vocab,
        tokenizer=tokenizer,
        their_tokenizer=their_tokenizer,
        **options,
    )
    chosen = rows if limit is None else islice(iter(rows), limit)
    tally = tallied(reader, chosen, tokenizer, their_tokenizer, collate, documents, batch_size)
    if not any(sums.get("tokens") for sums in tally.documents.values()):
        raise ValueError("rows: none of their tokens has a label, so there is nothing to measure")
    return tally.measured(reader.notes, drafted=drafted)


def tallied(
    reader: Reader,
    rows: Iterable[dict[str, Any]],
    tokenizer: Any = None,
    their_tokenizer: Any = None,
    collate: Callable[[Sequence[dict[str, Any]]], dict[str, Any]] | None = None,
    documents: Int[np.ndarray, "sequences"] | None = None,
    batch_size: int = 8,
) -> Tally:
    """Return the sums over rows: of one rank's share, say, to be added to those of the others."""
    tally, seen = Tally(), 0
    with evaluating(*reader.modules):
        for batch, reading in readings(reader, rows, tokenizer, their_tokenizer, collate, batch_size):
            count = int(sequence_of(batch).max()) + 1
            numbers = batch["index"].tolist() if "index" in batch else list(range(seen, seen + count))
            tally.add(reading, numbers if documents is None else [int(documents[number]) for number in numbers])
            seen += count
    return tally


def readings(
    reader: Reader,
    rows: Iterable[dict[str, Any]],
    tokenizer: Any = None,
    their_tokenizer: Any = None,
    collate: Callable[[Sequence[dict[str, Any]]], dict[str, Any]] | None = None,
    batch_size: int = 8,
) -> Iterator[tuple[dict[str, Any], Reading]]:
    """Yield each batch, and what was measured of it."""
    remaining = iter(rows)
    while some := list(islice(remaining, batch_size)):
        if collate is None:
            collate = _collator(some, tokenizer, their_tokenizer)
        if hasattr(reader.teacher, "prefetch") and not isinstance(collate, Prefetched):
            collate = Prefetched(collate, reader.teacher.prefetch)
        batch = moved(collate(some), reader.device)
        yield batch, reader(batch)


def _collator(rows: Sequence[dict[str, Any]], tokenizer: Any, their_tokenizer: Any) -> Callable[..., dict[str, Any]]:
    if "seq_lengths" in rows[0]:
        return text_collator("padding_free", tokenizer, their_tokenizer)
    return collator_for(rows, tokenizer, their_tokenizer)


def moved(batch: Any, device: torch.device) -> Any:
    """Return a batch with its tensors, those of a second reading too, on a device."""
    if isinstance(batch, dict):
        return {name: moved(value, device) for name, value in batch.items()}
    return batch.to(device) if isinstance(batch, Tensor) else batch
