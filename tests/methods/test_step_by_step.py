"""Distilling step-by-step: each task averaged over its own tokens; the terms see disjoint parts of a batch."""

import pytest
import torch
from bigram import Table, batch_of, descend, gradients, texts, total
from pydantic import ValidationError

from kdlm.losses import CrossEntropy, cross_entropy, kept_rows
from kdlm.methods import SequenceKD, Step, StepByStep, StepByStepSection
from kdlm.signal import domain_id

LENGTHS = [5, 9, 4, 12, 7, 3, 8, 6]
TASKS = ["label", "rationale"] * 4


@pytest.fixture
def nets() -> dict[str, Table]:
    return {"student": Table(1, width=5)}


def batch(chosen, tasks=TASKS, layout="padded"):
    made = batch_of(chosen, layout, told=False)
    return made | {"domain": torch.tensor([domain_id(task) for task in tasks])}


def method(a: float = 0.5) -> StepByStep:
    return StepByStep([CrossEntropy()], tasks={"label": a, "rationale": 1 - a}, chunk_rows=4)


def of(task: str, chosen):
    return [text for text, name in zip(chosen, TASKS, strict=True) if name == task]


@pytest.mark.parametrize("a", [0.0, 0.3, 1.0])
def test_value_and_gradient_are_those_of_the_formula(nets, a):
    chosen = texts(LENGTHS)
    means = []
    for task in ("label", "rationale"):
        some = batch_of(of(task, chosen), told=False)
        rows = kept_rows(some["labels"])
        logits = rows.select(nets["student"].logits()[some["input_ids"]])
        means.append(cross_entropy(logits, rows.labels).mean())
    expected = a * means[0] + (1 - a) * means[1]
    torch.testing.assert_close(total(method(a), nets, [batch(chosen)]), expected)
    torch.testing.assert_close(
        gradients(method(a), nets, [batch(chosen)]),
        list(torch.autograd.grad(expected, nets["student"].parameters)),
    )


def test_with_all_weight_on_labels_it_is_fine_tuning_on_labels(nets):
    chosen = texts(LENGTHS)
    alone = gradients(SequenceKD([CrossEntropy()]), nets, [batch_of(of("label", chosen), told=False)])
    torch.testing.assert_close(gradients(method(1.0), nets, [batch(chosen)]), alone)


@pytest.mark.parametrize("layout", ["padded", "padding_free"])
def test_how_rows_are_batched_does_not_show(nets, layout):
    chosen = texts(LENGTHS)
    whole = gradients(method(), nets, [batch(chosen)])
    cuts = [slice(0, 3), slice(3, 4), slice(4, 8)]  # one micro-batch of one task alone
    cut = gradients(method(), nets, [batch(chosen[some], TASKS[some], layout) for some in cuts])
    torch.testing.assert_close(cut, whole)


def test_an_evaluation_has_the_steps_own_loss_and_measures_of_all_tokens(nets):
    own, made = method(0.3), batch(texts(LENGTHS))
    found, terms = own.evaluate(nets, made, Step(0, 10)), own.losses(nets, made, frozenset(), Step(0, 10)).terms
    assert found.terms.keys() == terms.keys() == {"label", "rationale"}
    assert all(torch.equal(term.sum, terms[name].sum) for name, term in found.terms.items())
    value, unit = found.metrics["cross_entropy"]
    torch.testing.assert_close(value, sum(term.sum for term in terms.values()))
    assert unit == "tokens"


def test_longer_rationales_do_not_take_weight_from_labels(nets):
    short, long = texts([6, 8]), texts([6, 8, 30])
    both = batch(short, ["label", "rationale"]), batch(long, ["label", "rationale", "rationale"])
    terms = [method().losses(nets, one, frozenset(), Step(0, 1)).terms["label"] for one in both]
    counts = [method().counts(one)["label_tokens"] for one in both]
    torch.testing.assert_close(terms[0].sum / counts[0], terms[1].sum / counts[1])


def test_a_row_of_no_task_is_an_error_that_says_what_to_do(nets):
    with pytest.raises(ValueError, match=r"method\.tasks: a row of a domain that is none of label, rationale"):
        method().counts(batch(texts([4]), ["other"]))


def test_other_losses_are_refused():
    with pytest.raises(ValueError, match="takes cross_entropy only"):
        StepByStepSection().build([type("Other", (), {"name": "forward_kl"})()], None)
    with pytest.raises(ValidationError):
        StepByStepSection(tasks={})


def test_both_tasks_are_learned(nets):
    chosen = texts(LENGTHS)
    before = total(method(), nets, [batch(chosen)]).item()
    for _ in range(20):
        descend(method(), nets, [batch(chosen)], rate=0.5)
    assert total(method(), nets, [batch(chosen)]).item() < before / 2
