"""Which tokens count, and the one reduction."""

import pytest
import torch

from kdlm.losses import IGNORE_INDEX, count_kept, count_real, cross_entropy, kept_rows, real_rows, reduce
from kdlm.losses.tokens import following, rows_of

LABELS = torch.tensor([[IGNORE_INDEX, 5, IGNORE_INDEX, 7], [3, IGNORE_INDEX, IGNORE_INDEX, 4]])


def test_a_row_is_kept_where_the_next_token_is_trained_on():
    rows = kept_rows(LABELS)
    assert rows.index.tolist() == [0, 2, 6]
    assert rows.labels.tolist() == [5, 7, 4]
    assert count_kept(LABELS) == len(rows) == 3


def test_the_loss_of_kept_rows_is_that_of_shifted_labels(draw):
    logits = draw(2, 4, 11)
    rows = kept_rows(LABELS)
    ours = reduce(cross_entropy(rows.select(logits), rows.labels), count_kept(LABELS))
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), LABELS[:, 1:].flatten())
    torch.testing.assert_close(ours, expected)


def test_the_label_of_a_first_token_is_never_a_target():
    labels = torch.full((1, 3), IGNORE_INDEX)
    labels[0, 0] = 5
    assert len(kept_rows(labels)) == 0 and count_kept(labels) == 0


@pytest.mark.parametrize("num_items", [0, torch.tensor(0)])
def test_a_batch_without_a_kept_token_gives_zero_and_finite_gradients(draw, num_items):
    logits = draw(2, 4, 11).requires_grad_()
    rows = kept_rows(torch.full((2, 4), IGNORE_INDEX))
    loss = reduce(cross_entropy(rows.select(logits), rows.labels), num_items)
    loss.backward()
    assert loss == 0 and (logits.grad == 0).all()


def test_two_uneven_parts_sum_to_the_whole(draw):
    values = draw(10)
    parts = reduce(values[:3], 10) + reduce(values[3:], torch.tensor(10))
    torch.testing.assert_close(parts, values.mean())


def test_one_token_sequences_have_no_rows():
    assert len(kept_rows(torch.tensor([[4], [5]]))) == 0


@pytest.mark.parametrize("weight", [None, torch.tensor([2.0, 0.5])])
def test_real_rows_are_all_but_padding_and_count_by_their_sequences_weight(weight):
    ids = torch.tensor([[4, 5, 6], [7, 8, 0]])
    own = {} if weight is None else {"weight": weight}
    padded = {"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]), **own}
    flat = {"input_ids": torch.tensor([[4, 5, 6, 7, 8]]), "position_ids": torch.tensor([[0, 1, 2, 0, 1]]), **own}
    for batch in (padded, flat):
        rows = real_rows(batch)
        assert rows.labels.tolist() == rows.select(batch["input_ids"]).tolist() == [4, 5, 6, 7, 8]
        assert rows.sum(torch.ones(5)) == count_real(batch) == (5 if weight is None else 7)


HALVES = [[0, 1, 2, 3, 4, 5, 6, 7], [8, 9, 10, 11, 12, 13, 14, 15]]
"""Positions of two ranks, each a half of the sequence (Ulysses)."""
ENDS_AND_MIDDLE = [[0, 1, 2, 3, 12, 13, 14, 15], [4, 5, 6, 7, 8, 9, 10, 11]]
"""As torch's context_parallel deals them out, so that causal attention is as much work on both."""


@pytest.mark.parametrize(("positions", "missed"), [(HALVES, 7), (ENDS_AND_MIDDLE, 11)])
def test_parts_of_sequences_have_the_rows_of_the_whole_if_labels_are_shifted_before_the_cut(
    positions: list[list[int]], missed: int
) -> None:
    """Shifted afterwards, a part misses what follows its last token, and takes what is not next for it at a seam."""
    torch.manual_seed(0)
    ids = torch.randint(100, 200, (3, 16))
    labels = ids.where(torch.rand(3, 16) > 0.2, IGNORE_INDEX)
    labels[:, 8], labels[:, 12] = ids[:, 8], ids[:, 12]  # wanted behind the cuts
    rows = kept_rows(labels)
    everything = set(zip(rows.index.tolist(), rows.labels.tolist(), strict=True))

    def put_back(shift_first: bool) -> list[tuple[int, int]]:
        found = []
        for own in positions:
            part = rows_of(following(labels)[:, own]) if shift_first else kept_rows(labels[:, own])
            at = torch.arange(ids.numel()).view(ids.shape)[:, own].flatten()[part.index]
            found += zip(at.tolist(), part.labels.tolist(), strict=True)
        return found

    parts = put_back(shift_first=True)
    assert len(parts) == len(rows) == count_kept(labels) and set(parts) == everything
    late = set(put_back(shift_first=False))
    assert {row * 16 + missed for row in range(3)} <= {at for at, _ in everything - late}
    assert bool(late - everything) == (positions is ENDS_AND_MIDDLE)
