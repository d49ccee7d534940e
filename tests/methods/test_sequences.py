"""Which sequence a token belongs to, in every layout, and lines of one sequence each."""

import pytest
import torch
from bigram import batch_of, texts

from kdlm.data import Collator
from kdlm.data.packing import packed_row
from kdlm.losses import kept_rows
from kdlm.methods.sequences import count_sequences, group_rows, lay_out
from kdlm.signal import sequence_of


@pytest.mark.parametrize("layout", ["padded", "padding_free"])
def test_sequences_are_told_apart_in_every_layout(layout):
    batch = batch_of(texts([5, 3, 8, 2]), layout)
    rows = kept_rows(batch["labels"])
    assert rows.of_labels(sequence_of(batch)).tolist() == [0, 0, 0, 1, 2, 2, 2, 2, 2, 2]
    assert count_sequences(batch) == 3  # the last one is a prompt alone


def test_packed_sequences_are_told_apart():
    one, two, three = ([{"input_ids": ids, "labels": ids}] for ids in ([5, 6, 7], [8, 9], [3, 4, 5, 6]))
    packed = [packed_row({**row, "index": 0} for row in rows) for rows in (one + two, three)]
    batch = Collator(0, layout="padding_free")(packed)
    assert sequence_of(batch).tolist() == [[0, 0, 0, 1, 1, 2, 2, 2, 2]]
    assert count_sequences(batch) == 3


def test_nothing_kept_is_no_sequence():
    batch = batch_of(texts([2, 2]))
    assert count_sequences(batch) == 0
    group, lengths = group_rows(torch.zeros(0, dtype=torch.long))
    assert group.shape == lengths.shape == (0,)
    assert lay_out(torch.zeros(0), group, lengths, 0.0)[0].shape == (0, 0)


def test_lines_hold_the_rows_of_a_sequence_in_their_order():
    numbers, values = torch.tensor([4, 4, 4, 0, 2, 2]), torch.arange(6.0)
    group, lengths = group_rows(numbers)
    lines, place = lay_out(values, group, lengths, -1.0)
    assert lines.tolist() == [[3, -1, -1], [4, 5, -1], [0, 1, 2]]
    assert place.tolist() == [0, 1, 2, 0, 0, 1] and lengths.tolist() == [1, 2, 3]
