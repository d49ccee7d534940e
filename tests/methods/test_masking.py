"""What is hidden of a text, and what it weighs: masked diffusion's bound, however a batch is laid out."""

import itertools
import math
from typing import Any

import pytest
import torch
from tiny_masked import MASK, VOCAB, texts, tiny_masked

from kdlm.data import Collator
from kdlm.losses import CrossEntropy, ForwardKL, ReverseKL
from kdlm.methods import MaskedKD, Step
from kdlm.methods.masked.masking import Texts, masked
from kdlm.models import Predictor
from kdlm.signal import IGNORE_INDEX, Dense

STUDENT = frozenset({"student"})


def batch_of(rows: list[dict[str, Any]], layout: Any = "padded") -> dict[str, torch.Tensor]:
    return Collator(0, layout=layout)(rows)


def losses(method: MaskedKD, nets: dict[str, Any], batch: dict[str, torch.Tensor], step: int = 0) -> Any:
    return method.losses(nets, batch, STUDENT, Step(step, 10, seed=3))


def hidden_of(batch: dict[str, torch.Tensor], step: int = 0) -> dict[int, list[int]]:
    """Return the hidden places of each row of the data by its number."""
    found = Texts.of(batch).hidden(3, step)
    return {int(number): row.nonzero()[:, 0].tolist() for number, row in zip(batch["index"], found, strict=True)}


def test_what_is_hidden_does_not_depend_on_the_batch_its_padding_or_its_layout() -> None:
    rows = texts([5, 9, 7, 3])
    whole = hidden_of(batch_of(rows))
    assert whole == hidden_of(batch_of(rows, "padding_free"))
    assert whole == hidden_of(batch_of(rows[::-1]))
    assert whole == {number: places for row in rows for number, places in hidden_of(batch_of([row])).items()}
    assert whole != hidden_of(batch_of(rows), step=1)


def test_completions_of_one_prompt_hide_different_tokens() -> None:
    same = [dict(texts([20])[0], index=4) for _ in range(6)]
    found = Texts.of(batch_of(same)).hidden(3, 0)
    assert len({tuple(row.tolist()) for row in found}) == 6


def test_only_trained_tokens_are_hidden_and_labels_are_the_tokens_at_their_places() -> None:
    batch = batch_of(texts([5, 9, 7, 3]))
    whole = Texts.of(batch)
    for step in range(20):
        seen = masked(whole, whole.hidden(3, step), MASK)
        places = torch.zeros_like(whole.trained).flatten()
        places[seen.rows.index] = True
        assert not (places.view_as(whole.trained) & ~whole.trained).any()
        assert (seen.batch["input_ids"].flatten()[seen.rows.index] == MASK).all()
        assert (batch["input_ids"].flatten()[seen.rows.index] == seen.rows.labels).all()
        assert (batch["labels"].flatten()[seen.rows.index] == seen.rows.labels).all()


def test_the_weights_of_a_text_add_up_to_its_tokens_whatever_was_drawn() -> None:
    whole = Texts.of(batch_of(texts([5, 9, 7, 3])))
    for step in range(20):
        seen = masked(whole, whole.hidden(3, step), MASK)
        torch.testing.assert_close(seen.by_text(seen.weights), whole.sizes.float())


def test_every_number_of_hidden_tokens_is_as_likely_as_another() -> None:
    whole = Texts.of(batch_of([dict(texts([6])[0], index=number) for number in range(4000)]))
    counts = torch.bincount(whole.hidden(3, 0).sum(-1), minlength=5)
    assert counts[0] == 0
    assert ((counts[1:] - 1000).abs() < 5 * math.sqrt(4000 * 0.25 * 0.75)).all()
    per_place = whole.hidden(3, 0)[:, 2:].float().mean(0)
    assert ((per_place - 0.625).abs() < 5 * 0.5 / math.sqrt(4000)).all()  # (1 + 2 + 3 + 4) / 4 / 4


def test_a_text_without_trained_tokens_hides_nothing() -> None:
    row = {"input_ids": [3, 4], "labels": [IGNORE_INDEX] * 2, "index": 0}
    assert not Texts.of(batch_of([row])).hidden(3, 0).any()


def test_rows_without_a_number_are_refused() -> None:
    row = {key: value for key, value in texts([5])[0].items() if key != "index"}
    with pytest.raises(ValueError, match="give rows a column `index`"):
        Texts.of(batch_of([row]))


def enumerated(model: Any, row: dict[str, Any]) -> float:
    """Return the bound on -log p of a text: over all sets of hidden tokens, each size and each set of it alike."""
    ids = torch.tensor([row["input_ids"]])
    places = [place for place, label in enumerate(row["labels"]) if label != IGNORE_INDEX]
    total = 0.0
    for count in range(1, len(places) + 1):
        sets = list(itertools.combinations(places, count))
        for hidden in sets:
            read = ids.clone()
            read[0, list(hidden)] = MASK
            logs = model(input_ids=read).logits.log_softmax(-1)[0]
            nll = -sum(logs[place, ids[0, place]].item() for place in hidden)
            total += len(places) / count * nll / (len(places) * len(sets))
    return total


@torch.no_grad()
def test_the_bound_is_the_mean_over_all_orders_of_the_chain_rule() -> None:
    model, row = tiny_masked(), texts([6])[0]
    ids, total = torch.tensor([row["input_ids"]]), 0.0
    orders = list(itertools.permutations(range(2, 6)))
    for order in orders:
        read = ids.clone()
        read[0, 2:] = MASK
        for place in order:
            total -= model(input_ids=read).logits.log_softmax(-1)[0, place, ids[0, place]].item()
            read[0, place] = ids[0, place]
    assert enumerated(model, row) == pytest.approx(total / len(orders), rel=1e-9)


@torch.no_grad()
def test_the_mean_of_the_loss_is_the_bound_of_all_masks() -> None:
    model, row = tiny_masked(), texts([6])[0]
    batch = batch_of([dict(row, index=number) for number in range(3000)])
    terms = losses(MaskedKD([CrossEntropy()]), {"student": Predictor(model)}, batch)
    whole = Texts.of(batch)
    seen = masked(whole, whole.hidden(3, 0), MASK)
    logs = model(**seen.batch).logits.flatten(0, 1)[seen.rows.index].log_softmax(-1)
    each = seen.by_text(-seen.weights * logs.gather(-1, seen.rows.labels[:, None])[:, 0])
    assert terms.terms["token_loss"].sum.item() == pytest.approx(each.sum().item(), rel=1e-6)
    error = each.std().item() / math.sqrt(len(each))
    assert abs(each.mean().item() - enumerated(model, row)) < 4 * error < 0.4


def test_a_law_of_independent_tokens_has_its_own_likelihood_for_bound() -> None:
    torch.manual_seed(0)
    logits = torch.randn(6, VOCAB, dtype=torch.float64)

    class Independent:
        mask_id = MASK

        def __call__(self, batch: Any, rows: Any) -> Dense:
            return Dense(logits[rows.index % batch["input_ids"].shape[1]])

    row = texts([6])[0]
    batch = batch_of([dict(row, index=number) for number in range(4000)])
    method = MaskedKD([CrossEntropy()])
    mean = losses(method, {"student": Independent()}, batch).terms["token_loss"].sum.item() / 4000
    exact = -sum(logits[place].log_softmax(-1)[row["input_ids"][place]].item() for place in range(2, 6))
    assert mean == pytest.approx(exact, rel=0.02)


@pytest.mark.parametrize("loss", [ForwardKL(), ReverseKL()])
def test_a_teacher_that_is_the_student_leaves_no_loss_and_no_gradient(loss: Any) -> None:
    student, teacher = tiny_masked(), tiny_masked()
    nets = {"student": Predictor(student), "teacher": Predictor(teacher)}
    terms = losses(MaskedKD([loss]), nets, batch_of(texts([5, 9, 7])))
    terms.terms["token_loss"].sum.backward()
    assert terms.terms["token_loss"].sum.abs() < 1e-10
    assert max(p.grad.abs().max() for p in student.parameters()) < 1e-10


def test_the_sum_and_its_gradient_do_not_depend_on_layout() -> None:
    rows, found = texts([5, 9, 7, 3]), []
    for layout in ("padded", "padding_free"):
        student = tiny_masked()
        nets = {"student": Predictor(student), "teacher": Predictor(tiny_masked(1))}
        term = losses(MaskedKD([CrossEntropy(), ForwardKL()]), nets, batch_of(rows, layout)).terms["token_loss"]
        term.sum.backward()
        found.append([term.sum.detach(), *(p.grad for p in student.parameters())])
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_evaluation_hides_the_same_tokens_at_every_step_and_its_means_are_means() -> None:
    nets = {"student": Predictor(tiny_masked()), "teacher": Predictor(tiny_masked(1))}
    method, batch = MaskedKD([ForwardKL()]), batch_of(texts([5, 9, 7, 3]))
    first, second = (method.evaluate(nets, batch, Step(step, 10, seed=3)) for step in (0, 7))
    assert first.metrics.keys() == second.metrics.keys() >= {"cross_entropy", "kl_to_teacher", "top1_agreement"}
    for name, (value, unit) in first.metrics.items():
        assert unit == "tokens" and torch.equal(value, second.metrics[name][0])
    same = method.evaluate({**nets, "teacher": nets["student"]}, batch, Step(0, 10, seed=3))
    assert same.metrics["top1_agreement"][0].item() == pytest.approx(method.counts(batch)["tokens"].item())
