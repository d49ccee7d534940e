"""A batch as the question that is put to a server: its sequences without padding, and their kept positions."""

from collections.abc import Mapping

import torch
from torch import Tensor

from kdlm.signal import IGNORE_INDEX
from kdlm.teachers.wire import Question


def question_of(batch: Mapping[str, Tensor]) -> Question:
    """Return the sequences of a batch and the positions whose next token is trained on, in the order of its rows.

    Raises ValueError when the batch is padded on the left.
    """
    ids, labels = batch["input_ids"].cpu(), batch["labels"].cpu()
    there, first = torch.ones_like(ids, dtype=torch.bool), torch.zeros_like(ids, dtype=torch.bool)
    if "attention_mask" in batch:
        there = batch["attention_mask"].cpu().bool()
        if bool((there[:, 1:] & ~there[:, :-1]).any()):
            raise ValueError("attention_mask: a server teacher reads batches that are padded on the right")
    if "position_ids" in batch and "attention_mask" not in batch:
        first |= batch["position_ids"].cpu() == 0
    first[:, 0] = True
    kept = torch.zeros_like(there)
    kept[:, :-1] = labels[:, 1:] != IGNORE_INDEX
    if bool((kept & ~there).any()):
        raise ValueError("labels: a position of padding is trained on")
    starts = first[there].nonzero().squeeze(-1)  # in the ids laid end to end
    ends = torch.cat([starts[1:], torch.tensor([int(there.sum())])])
    return Question(ids[there], ends - starts, kept[there].nonzero().squeeze(-1))
