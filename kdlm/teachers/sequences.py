"""A batch as the question that is put to a server: its sequences without padding, and their kept positions."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from kdlm.signal import IGNORE_INDEX
from kdlm.store import cut
from kdlm.teachers.wire import Question


def question_of(batch: Mapping[str, Tensor]) -> Question:
    """Return the sequences of a batch and the positions whose next token is trained on, in the order of its rows.

    Raises ValueError when the batch is padded on the left.
    """
    sequences = cut(batch)
    lengths = np.array([len(ids) for ids, _ in sequences], dtype=np.int64)
    kept = [np.flatnonzero(np.append(labels[1:] != IGNORE_INDEX, False)) for _, labels in sequences]
    starts = np.cumsum(lengths) - lengths
    rows = np.concatenate([start + places for start, places in zip(starts, kept, strict=True)])
    ids = np.concatenate([ids for ids, _ in sequences])
    return Question(torch.from_numpy(ids), torch.from_numpy(lengths), torch.from_numpy(rows))
