"""Sequences: which one is asked about, and at which of its positions.

A sequence is known by its tokens and by nothing else, so a capture answers any batch, packing, order or mix that holds
it. A position is kept where the next token is trained on, as everywhere.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import xxhash
from torch import Tensor

from kdlm.signal import IGNORE_INDEX

KEY_BYTES = 16


class Asked(NamedTuple):
    """A sequence and some of its positions.

    Attributes:
        key: the 128-bit hash of its token ids.
        length: how many tokens it has.
        positions: ascending, int32; position t speaks of the token at t + 1.
    """

    key: bytes
    length: int
    positions: np.ndarray


def sequence_key(ids: np.ndarray) -> bytes:
    """Return the hash of token ids."""
    return xxhash.xxh3_128_digest(np.ascontiguousarray(ids, dtype="<i4").tobytes())


def asked(ids: np.ndarray, labels: np.ndarray) -> Asked:
    """Return a sequence with its kept positions; labels are unshifted."""
    kept = np.flatnonzero(labels[1:] != IGNORE_INDEX).astype(np.int32)
    return Asked(sequence_key(ids), len(ids), kept)


def cut(batch: Mapping[str, Tensor]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return token ids and labels of each sequence of a batch, without padding, in the order in which their rows are.

    Raises ValueError for a batch that is padded on the left, or trained on in its padding.
    """
    ids, labels = batch["input_ids"].cpu().numpy(), batch["labels"].cpu().numpy()
    if "position_ids" in batch and "attention_mask" not in batch:
        starts = np.flatnonzero(batch["position_ids"].cpu().numpy()[0] == 0)
        ends = np.append(starts[1:], ids.shape[1])
        return [(ids[0, start:end], labels[0, start:end]) for start, end in zip(starts, ends, strict=True)]
    there = np.ones_like(ids, dtype=bool)
    if "attention_mask" in batch:
        there = batch["attention_mask"].cpu().numpy().astype(bool)
    if (there[:, 1:] & ~there[:, :-1]).any():
        raise ValueError("attention_mask: this teacher reads batches that are padded on the right")
    if (labels[:, 1:][~there[:, 1:]] != IGNORE_INDEX).any():
        raise ValueError("labels: a position of padding is trained on")
    return [(row[:size], label[:size]) for row, label, size in zip(ids, labels, there.sum(-1), strict=True)]


def of_batch(batch: Mapping[str, Tensor]) -> list[Asked]:
    """Return what a batch asks of each of its sequences."""
    return [asked(ids, labels) for ids, labels in cut(batch)]
