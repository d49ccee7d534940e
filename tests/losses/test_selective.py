"""TSD-KD's terms: the ranking, the gate, and the sum over rows that want different amounts of each."""

import math
from itertools import permutations

import pytest
import torch
from linear_pair import VOCAB, Allocations, leaves
from torch.autograd import gradcheck

from kdlm.losses import Selective, chunked, entropy, gated_jsd, generalised_jsd, plackett_luce
from kdlm.signal import Dense, TopK


def ranked_by_the_book(student, teacher, k):
    """One row at a time: the chance of drawing the teacher's order without replacement."""
    values = []
    for z, other in zip(student, teacher, strict=True):
        left = z.topk(k).indices.tolist()
        log_chance = torch.zeros((), dtype=z.dtype)
        while left:
            best = max(left, key=lambda token, other=other: other[token].item())
            log_chance = log_chance + z[best] - z[left].logsumexp(-1)
            left.remove(best)
        values.append(-log_chance)
    return torch.stack(values)


@pytest.mark.parametrize("k", [1, 2, 5, 17])
def test_the_ranking_is_that_of_draws_without_replacement(draw, k):
    student, teacher = draw(6, 17).requires_grad_(), draw(6, 17)
    ours, expected = plackett_luce(student, teacher, k=k), ranked_by_the_book(student, teacher, k)
    torch.testing.assert_close(ours, expected)
    for a, b in zip(*(torch.autograd.grad(x.sum(), student) for x in (ours, expected)), strict=True):
        torch.testing.assert_close(a, b)


def test_the_chances_of_all_orders_add_up_to_one(draw):
    student = draw(1, 4)
    teachers = torch.tensor(list(permutations(range(4)))).double()
    assert plackett_luce(student.expand(24, 4), teachers, k=4).neg().exp().sum().item() == pytest.approx(1)


def test_the_teachers_best_candidate_is_raised_and_its_worst_lowered(draw):
    student, teacher = draw(50, 17).requires_grad_(), draw(50, 17)
    (gradient,) = torch.autograd.grad(plackett_luce(student, teacher, k=6).sum(), student)
    candidates = student.topk(6).indices
    order = candidates.gather(-1, teacher.gather(-1, candidates).argsort(-1, descending=True))
    assert (gradient.gather(-1, order[:, :1]) < 0).all() and (gradient.gather(-1, order[:, -1:]) > 0).all()
    others = torch.ones_like(student).scatter(-1, candidates, 0.0)
    assert (gradient * others == 0).all()
    assert gradient.sum(-1).abs().max() < 1e-12


def test_one_candidate_gives_nothing_and_too_many_are_all_of_them(draw):
    student, teacher = draw(5, 7).requires_grad_(), draw(5, 7)
    alone = plackett_luce(student, teacher, k=1)
    assert alone.abs().max() == 0 and torch.autograd.grad(alone.sum(), student)[0].abs().max() == 0
    assert torch.equal(plackett_luce(student, teacher, k=50), plackett_luce(student, teacher, k=7))


def test_the_order_of_the_vocabulary_and_a_constant_are_inert(draw):
    student, teacher = draw(5, 17), draw(5, 17)
    order = torch.randperm(17, generator=torch.Generator().manual_seed(0))
    for function in (plackett_luce, gated_jsd):
        value = function(student, teacher)
        torch.testing.assert_close(function(student[:, order], teacher[:, order]), value)
        torch.testing.assert_close(function(student + draw(5, 1), teacher + draw(5, 1)), value)


def test_the_gate_is_a_half_where_both_are_equally_certain(draw):
    student = draw(5, 17)
    teacher = student[:, torch.randperm(17, generator=torch.Generator().manual_seed(0))]
    torch.testing.assert_close(gated_jsd(student, teacher), generalised_jsd(student, teacher, beta=0.9) / 2)


def test_the_gate_opens_where_the_student_is_less_certain_and_carries_no_gradient(draw):
    sharp, flat = 4 * draw(9, 17), (0.1 * draw(9, 17)).requires_grad_()
    gate = gated_jsd(flat, sharp) / generalised_jsd(flat, sharp, beta=0.9)
    assert (gate > 0.75).all()
    torch.testing.assert_close(gate, torch.sigmoid(entropy(flat) - entropy(sharp)))
    wide = gated_jsd(flat, sharp, gate_temperature=100.0) / generalised_jsd(flat, sharp, beta=0.9)
    assert ((wide - 0.5).abs() < 0.01).all()
    ours, plain = (
        torch.autograd.grad(x.sum(), flat, retain_graph=True)[0]
        for x in (gated_jsd(flat, sharp), gate.detach() * generalised_jsd(flat, sharp, beta=0.9))
    )
    torch.testing.assert_close(ours, plain)


def test_entropy_lies_between_zero_and_the_logarithm_of_the_vocabulary(draw):
    torch.testing.assert_close(entropy(torch.zeros(2, 11)), torch.full((2,), math.log(11)))
    assert (entropy(1e4 * draw(9, 11)) < 1e-6).all()
    assert gradcheck(entropy, draw(3, 7).requires_grad_())


def test_finite_differences_agree_with_the_gradient_of_the_ranking(draw):
    teacher, student = draw(3, 7), draw(3, 7).requires_grad_()
    assert gradcheck(lambda z: plackett_luce(z, teacher, k=4), student)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_logits_give_finite_values_and_gradients(draw, dtype):
    for scale in (1e2, 1e4):
        student, teacher = draw(9, 17).mul(scale).to(dtype).requires_grad_(), draw(9, 17).mul(scale).to(dtype)
        for function in (plackett_luce, gated_jsd):
            value = function(student, teacher)
            assert value.isfinite().all() and torch.autograd.grad(value.sum(), student)[0].isfinite().all()


def test_rows_get_the_terms_that_they_want_in_chunks_and_without_whole_logits(models, draw):
    student, teacher = models()
    weights = draw(3, len(student.hidden)).abs()
    weights[0, ::3] = 0
    value, parts = chunked(Selective(0.3, k=5), student, teacher, *weights, has_aux=True, chunk_rows=6)
    z, other = student.head.logits(student.hidden), teacher.head.logits(teacher.hidden)
    terms = {
        "indirect": weights[0] * plackett_luce(z, other, k=5),
        "direct": weights[1] * gated_jsd(z, other),
        "entropy": weights[2] * entropy(z),
    }
    for name, term in terms.items():
        torch.testing.assert_close(parts[name], term.detach())
    leaves = (student.hidden, student.head.weight)
    ours, plain = (torch.autograd.grad(x.sum(), leaves) for x in (value, sum(terms.values()) - 0.7 * terms["indirect"]))
    torch.testing.assert_close(ours, plain)


def test_a_teacher_of_few_tokens_is_refused(draw):
    log_probs, ids = draw(2, 7).log_softmax(-1).topk(3)
    with pytest.raises(ValueError, match="TopK"):
        chunked(Selective(), Dense(draw(2, 7)), TopK(ids, log_probs), *draw(3, 2), has_aux=True)


def test_no_tensor_over_all_rows_and_the_vocabulary_is_made(models):
    student, teacher = models()
    weights = torch.ones(3, len(student.hidden), dtype=torch.float64)
    with Allocations(*leaves(student), teacher.head.weight) as seen:
        chunked(Selective(), student, teacher, *weights, has_aux=True, chunk_rows=10)[0].sum().backward()
    assert max(seen.sizes) == 10 * VOCAB
