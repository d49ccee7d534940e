"""Skill-SD's estimator, by enumeration: reverse KL in value and gradient, and nothing where nothing is told."""

from typing import Any

import pytest
import torch
from tabular import COMPLETIONS, Table, batch_of, draw_table, gradient_on_states, mixed, run

from kdlm.losses import k3, reverse_kl
from kdlm.methods import RewardMethod, SkillSD

CAP = float("inf")


def batch_with(texts: Any, drawn_from: Table, informed: bool = True, rewards: Any = None) -> dict[str, torch.Tensor]:
    count = len(texts)
    return batch_of(texts, drawn_from) | {
        "reward": torch.zeros(count) if rewards is None else torch.tensor(rewards),
        "index": torch.zeros(count, dtype=torch.int64),
        "informed": torch.full((count,), informed),
    }


def skill_gradient(method: SkillSD, student: Table, teacher: Table, batch: Any) -> torch.Tensor:
    term = run(method, student, teacher, batch).terms["skill"]
    return torch.autograd.grad(term.weight * term.sum, student.logits)[0]


@pytest.mark.parametrize("share", [1.0, 0.6])
def test_over_all_that_may_be_drawn_its_gradient_is_that_of_reverse_kl(share):
    """Whatever the text was drawn from: the student of now or a mixture with another one."""
    student, teacher = draw_table(0), Table(draw_table(1).logits.detach())
    drawn_from = mixed(student, draw_table(2), share)
    method, total = SkillSD(weight=0.3, importance_cap=CAP), torch.zeros_like(student.logits)
    for text in COMPLETIONS:
        one = skill_gradient(method, student, teacher, batch_with([text], drawn_from))
        total += drawn_from.probability(text).detach() * one
    expected = gradient_on_states(lambda q, p: reverse_kl(q, p), student, teacher, drawn_from)
    torch.testing.assert_close(total, 0.3 * expected, rtol=1e-5, atol=1e-6)


def test_token_by_token_it_is_the_printed_formula_in_value_and_gradient():
    student, teacher, old = draw_table(0), Table(draw_table(1).logits.detach()), Table(draw_table(2).logits.detach())
    texts = COMPLETIONS[::3]
    batch = batch_with(texts, old)
    ours = run(SkillSD(importance_cap=CAP), student, teacher, batch).terms["skill"]
    printed = torch.zeros((), dtype=torch.float64)
    for text in texts:
        log_q = student.log_probs(text)
        ratio = log_q - teacher.log_probs(text)
        printed = printed + ((log_q - old.log_probs(text)).exp() * k3(ratio)).sum()
    torch.testing.assert_close(ours.sum.double(), printed, rtol=1e-5, atol=1e-5)
    ours, theirs = (torch.autograd.grad(value, student.logits, retain_graph=True)[0] for value in (ours.sum, printed))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_without_its_ratio_the_gradient_would_be_that_of_forward_kl():
    """The pitfall that rho is there for: the mean of k3's own gradient is q - p."""
    student, teacher = draw_table(0), Table(draw_table(1).logits.detach())
    total = torch.zeros_like(student.logits)
    for text in COMPLETIONS:
        value = k3(student.log_probs(text) - teacher.log_probs(text)).sum()
        total += student.probability(text).detach() * torch.autograd.grad(value, student.logits)[0]
    reverse = gradient_on_states(lambda q, p: reverse_kl(q, p), student, teacher, student)
    assert (total - reverse).abs().max() > 0.05


def test_told_nothing_it_is_the_policy_gradient_alone():
    student, teacher = draw_table(0), Table(draw_table(1).logits.detach())
    texts = COMPLETIONS[3:9]
    batch = batch_with(texts, student, informed=False, rewards=[0.0, 1.0, 1.0, 0.0, 0.0, 0.5])
    terms = run(SkillSD(weight=1.0), student, teacher, batch)
    assert terms.terms["skill"].sum == 0
    (none,) = torch.autograd.grad(terms.terms["skill"].sum, student.logits, retain_graph=True)
    assert (none == 0).all()
    alone = run(RewardMethod(scaled=True), student, teacher, batch)
    assert torch.equal(terms.terms["policy"].sum, alone.terms["policy"].sum) and alone.terms["policy"].sum != 0
