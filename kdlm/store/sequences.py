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


def of_batch(batch: Mapping[str, Tensor]) -> list[Asked]:
    """Return the sequences of a batch, in the order in which their rows are."""
    ids, labels = batch["input_ids"].cpu().numpy(), batch["labels"].cpu().numpy()
    if "position_ids" in batch and "attention_mask" not in batch:
        starts = np.flatnonzero(batch["position_ids"].cpu().numpy()[0] == 0)
        ends = np.append(starts[1:], ids.shape[1])
        return [asked(ids[0, start:end], labels[0, start:end]) for start, end in zip(starts, ends, strict=True)]
    mask = batch.get("attention_mask")
    lengths = [ids.shape[1]] * len(ids) if mask is None else mask.sum(-1).tolist()
    return [asked(ids[row, :length], labels[row, :length]) for row, length in enumerate(lengths)]
