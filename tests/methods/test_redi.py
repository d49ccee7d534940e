"""REDI: length-normalised fine-tuning on the chosen side, and the rejected one taken away by its share."""

import copy

import pytest
import torch
from bigram import Table, descend, gradients, total
from torch import Tensor

from kdlm.data import Collator
from kdlm.losses import CrossEntropy, kept_rows
from kdlm.methods import REDI, SequenceKD, Step
from kdlm.signal import IGNORE_INDEX

Pair = tuple[list[int], list[int]]
PROMPT = 2


def pairs_of(lengths: list[tuple[int, int]], seed: int = 0) -> list[Pair]:
    draw = torch.Generator().manual_seed(seed)
    return [tuple(torch.randint(0, 13, (n,), generator=draw).tolist() for n in both) for both in lengths]  # type: ignore[misc]


def batch_of(pairs: list[Pair], layout="padded") -> dict[str, Tensor]:
    rows = []
    for number, sides in enumerate(pairs):
        labels = [label for ids in sides for label in ([IGNORE_INDEX] * PROMPT + ids[PROMPT:])]
        about = {"seq_lengths": [len(ids) for ids in sides], "rejected": [0, 1], "index": number}
        rows.append({"input_ids": [*sides[0], *sides[1]], "labels": labels, **about})
    return Collator(0, layout)(rows)


PAIRS = pairs_of([(5, 9), (4, 12), (8, 3), (6, 7)])
LAYOUTS = {
    "batches of one": lambda pairs: [batch_of([pair]) for pair in pairs],
    "uneven batches": lambda pairs: [batch_of(pairs[:3]), batch_of(pairs[3:])],
    "padding-free": lambda pairs: [batch_of(pairs, "padding_free")],
    "another order": lambda pairs: [batch_of(pairs[::-1], "padding_free")],
}


@pytest.fixture(params=[None, 5], ids=["logits", "hidden states"])
def nets(request) -> dict[str, Table]:
    return {"student": Table(1, width=request.param)}


def mean_log_q(table: Table, ids: list[int]) -> Tensor:
    log_q = table.logits().log_softmax(-1)
    return torch.stack([log_q[a, b] for a, b in zip(ids[PROMPT - 1 :], ids[PROMPT:], strict=False)]).mean()


def by_the_book(table: Table, pairs: list[Pair], alpha: float) -> Tensor:
    values = [-mean_log_q(table, chosen) + alpha * mean_log_q(table, rejected) for chosen, rejected in pairs]
    return torch.stack(values).mean()


@pytest.mark.parametrize("alpha", [0.0, 0.8, 1.0])
def test_value_and_gradient_are_those_of_the_formula(nets, alpha):
    expected, method = by_the_book(nets["student"], PAIRS, alpha), REDI(alpha=alpha, chunk_rows=4)
    torch.testing.assert_close(total(method, nets, [batch_of(PAIRS)]), expected)
    plain = torch.autograd.grad(expected, nets["student"].parameters)
    torch.testing.assert_close(gradients(method, nets, [batch_of(PAIRS)]), list(plain))


def test_without_the_rejected_side_it_is_fine_tuning_on_chosen_texts_of_one_length(nets):
    """Of one length, a mean over tokens is a mean over texts: then it is `sequence_kd` itself."""
    pairs = pairs_of([(7, 4), (7, 9), (7, 5)])
    rows = [{"input_ids": ids, "labels": [IGNORE_INDEX] * PROMPT + ids[PROMPT:]} for ids, _ in pairs]
    ours = gradients(REDI(alpha=0.0), nets, [batch_of(pairs)])
    torch.testing.assert_close(ours, gradients(SequenceKD([CrossEntropy()]), nets, [Collator(0)(rows)]))


def test_the_gradient_is_linear_in_alpha(nets):
    at = {alpha: gradients(REDI(alpha=alpha), nets, [batch_of(PAIRS)]) for alpha in (0.0, 0.3, 1.0)}
    for none, some, all_ in zip(*at.values(), strict=True):
        torch.testing.assert_close(some, none + 0.3 * (all_ - none))


def test_sides_that_are_alike_leave_a_share_of_fine_tuning(nets):
    alike = [(chosen, chosen) for chosen, _ in PAIRS]
    whole, left = (gradients(REDI(alpha=alpha), nets, [batch_of(alike)]) for alpha in (0.0, 0.8))
    torch.testing.assert_close(left, [(1 - 0.8) * gradient for gradient in whole])
    assert max(g.abs().max() for g in gradients(REDI(alpha=1.0), nets, [batch_of(alike)])) < 1e-12


@pytest.mark.parametrize("layout", LAYOUTS)
def test_how_pairs_are_batched_does_not_show(nets, layout):
    whole, cut = gradients(REDI(), nets, [batch_of(PAIRS)]), gradients(REDI(), nets, LAYOUTS[layout](PAIRS))
    assert whole[0].abs().max() > 1e-3
    torch.testing.assert_close(cut, whole)


@pytest.mark.parametrize("layout", ["padded", "padding_free"])
def test_it_counts_pairs_and_reads_both_sides(nets, layout):
    batch = batch_of(PAIRS, layout)
    counts = {unit: int(count) for unit, count in REDI().counts(batch).items()}
    chosen, rejected = (sum(len(pair[side]) - PROMPT for pair in PAIRS) for side in (0, 1))
    assert counts == {"tokens": chosen + rejected, "chosen_tokens": chosen, "pairs": len(PAIRS)}
    readings = REDI().losses(nets, batch, frozenset(), Step(0, 1)).readings()
    for side, name in enumerate(("chosen_log_prob", "rejected_log_prob")):
        value, unit = readings[name]
        mean = torch.stack([mean_log_q(nets["student"], pair[side]) for pair in PAIRS]).mean()
        torch.testing.assert_close(value / counts[unit], mean.detach())


def test_evaluation_measures_the_chosen_side_alone(nets):
    terms = REDI().evaluate(nets, batch_of(PAIRS), Step(0, 1))
    value, unit = terms.metrics["cross_entropy"]
    chosen = {"labels": batch_of(PAIRS)["labels"][::2], "input_ids": batch_of(PAIRS)["input_ids"][::2]}
    rows = kept_rows(chosen["labels"])
    log_q = rows.select(nets["student"].logits().log_softmax(-1)[chosen["input_ids"]])
    assert unit == "chosen_tokens"
    torch.testing.assert_close(value, -log_q.gather(-1, rows.labels[:, None]).sum().detach())


def test_a_batch_without_trained_tokens_reports_the_same_names(nets):
    batch = batch_of(PAIRS[:1])
    empty = copy.deepcopy(batch) | {"labels": torch.full_like(batch["labels"], IGNORE_INDEX)}
    assert int(REDI().counts(empty)["pairs"]) == 0
    full, none = (REDI().losses(nets, one, frozenset(), Step(0, 1)).readings() for one in (batch, empty))
    assert full.keys() == none.keys()
    assert all(value == 0 for value, _ in none.values())
    full, none = (REDI().evaluate(nets, one, Step(0, 1)).readings() for one in (batch, empty))
    assert full.keys() == none.keys()


def test_rows_without_pairs_are_refused(nets):
    batch = batch_of(PAIRS)
    del batch["rejected"]
    with pytest.raises(ValueError, match="redi: the data have no pairs"):
        REDI().counts(batch)


def test_the_likelihood_of_right_traces_falls_at_one_and_holds_below():
    """A wrong trace takes the right one's steps twice and ends badly, so at 1 it outweighs it on what both share.

    A step has 1 of the right trace's 9 tokens and 2 of the wrong one's 17: 1/9 < 2/17, and 1/9 > 0.8 * 2/17.
    """
    steps = list(range(9))
    batch = [batch_of([([*steps, 9, 10], [*steps, *steps, 11])])]

    def trained(table: Table, alpha: float, count: int) -> tuple[Table, float]:
        for _ in range(count):
            descend(REDI(alpha=alpha), {"student": table}, batch, rate=50.0)
        return table, mean_log_q(table, [*steps, 9, 10]).item()

    stage_1, before = trained(Table(1), 0.0, 20)
    ends = {alpha: trained(copy.deepcopy(stage_1), alpha, 200)[1] for alpha in (0.8, 1.0)}
    assert ends[1.0] < before < ends[0.8]
