"""The two losses for students of few bits lie between forward and reverse KL."""

import pytest
import torch

from kdlm.losses import CAKLD, TopKLD, confidence_aware_kl, forward_kl, reverse_kl, topk_divergence
from kdlm.signal import TopK


def test_the_whole_vocabulary_as_top_k_is_forward_kl_and_none_of_it_reverse_kl(draw):
    student, teacher = draw(5, 41), 2 * draw(5, 41)
    for k in (41, 100):
        torch.testing.assert_close(topk_divergence(student, teacher, k=k), forward_kl(student, teacher))
    torch.testing.assert_close(topk_divergence(student, teacher, k=0), reverse_kl(student, teacher))


@pytest.mark.parametrize("k", [1, 4, 40])
def test_top_k_agrees_with_its_definition_token_by_token(draw, k):
    student, teacher = draw(6, 41), 2 * draw(6, 41)
    got = topk_divergence(student, teacher, k=k)
    for row in range(6):
        q, p = student[row].softmax(-1).tolist(), teacher[row].softmax(-1).tolist()
        head = set(sorted(range(41), key=lambda token: -p[token])[:k])
        pairs = [(p[v], q[v]) if v in head else (q[v], p[v]) for v in range(41)]
        terms = [a * torch.tensor(a / b).log().item() - a + b for a, b in pairs]
        assert min(terms) >= -1e-12
        assert got[row].item() == pytest.approx(sum(terms), abs=1e-6)


def test_tokens_of_one_probability_enter_the_top_k_together(draw):
    student, teacher = draw(3, 9), torch.zeros(3, 9, dtype=torch.float64)
    torch.testing.assert_close(topk_divergence(student, teacher, k=2), forward_kl(student, teacher))


@pytest.mark.parametrize(("g", "limit"), [(0.0, forward_kl), (1.0, reverse_kl)])
def test_a_confidence_of_0_is_forward_kl_and_of_1_reverse_kl(draw, g, limit):
    student, teacher = draw(5, 41), draw(5, 41)
    torch.testing.assert_close(confidence_aware_kl(student, teacher, confidence=g), limit(student, teacher))


def test_a_given_confidence_is_that_of_the_released_code(draw):
    """BitDistiller's trainer: beta_prob * KL(student || teacher) + (1 - beta_prob) * KL(teacher || student)."""
    student, teacher = draw(5, 41), draw(5, 41)
    reverse = torch.nn.functional.kl_div(teacher.log_softmax(-1), student.softmax(-1), reduction="none").sum(-1)
    forward = torch.nn.functional.kl_div(student.log_softmax(-1), teacher.softmax(-1), reduction="none").sum(-1)
    torch.testing.assert_close(confidence_aware_kl(student, teacher, confidence=0.7), 0.7 * reverse + 0.3 * forward)


def test_by_default_each_row_is_weighed_by_the_teachers_greatest_probability(draw):
    student, teacher = draw(5, 41), 3 * draw(5, 41)
    each = [
        confidence_aware_kl(s, t, confidence=t.softmax(-1).max().item()) for s, t in zip(student, teacher, strict=True)
    ]
    torch.testing.assert_close(confidence_aware_kl(student, teacher), torch.stack(each))


@pytest.mark.parametrize("loss", [TopKLD(), CAKLD()])
def test_a_teacher_that_gives_its_top_k_alone_is_refused(loss, draw):
    few = TopK(torch.tensor([[0, 1]]), torch.tensor([[0.6, 0.3]]).log())
    with pytest.raises(ValueError, match="takes a signal of Dense, Hidden, Mixture, got a TopK"):
        loss(draw(1, 7), few, torch.tensor([0]))
