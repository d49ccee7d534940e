"""Contrast of embeddings: in the batch, and with a memory bank by noise-contrastive estimation."""

import math

import pytest
import torch
from torch.nn.functional import normalize

from kdlm.losses import contrast_in_batch, contrast_with_bank


def unit(draw, *shape):
    return normalize(draw(*shape), dim=-1)


def test_in_the_batch_the_order_of_the_rows_is_inert(draw):
    student, teacher = unit(draw, 6, 4), unit(draw, 6, 4)
    order = torch.randperm(6)
    torch.testing.assert_close(
        contrast_in_batch(student[order], teacher[order]), contrast_in_batch(student, teacher)[order]
    )


def test_in_the_batch_both_sides_learn_and_partners_cost_least(draw):
    student, teacher = unit(draw, 6, 4).requires_grad_(), unit(draw, 6, 4).requires_grad_()
    contrast_in_batch(student, teacher).sum().backward()
    assert student.grad.abs().sum() > 0 and teacher.grad.abs().sum() > 0
    alike, other = contrast_in_batch(student, student).mean(), contrast_in_batch(student, student.roll(1, 0)).mean()
    assert alike < other
    one = contrast_in_batch(student[:1], teacher[:1])
    assert one.abs().max() == 0, "a row without others has nothing to be told from"


def test_with_a_bank_it_is_the_released_codes_formula(draw):
    """The formula in probabilities, whose denominators the released code moves by 1e-7."""
    embedding, positive, negatives = unit(draw, 3, 8), unit(draw, 3, 8), unit(draw, 3, 5, 8)
    bank, temperature, z = 50, 0.3, 40.0
    p = torch.exp((embedding * positive).sum(-1) / temperature) / z
    n = torch.exp(torch.einsum("rw,rnw->rn", embedding, negatives) / temperature) / z
    noise = 5 / bank
    expected = -torch.log(p / (p + noise)) - torch.log(noise / (n + noise)).sum(-1)
    value = contrast_with_bank(
        embedding, positive, negatives, log_partition=math.log(z), bank=bank, temperature=temperature
    )
    torch.testing.assert_close(value, expected)


def test_the_bank_carries_no_gradient(draw):
    embedding, positive, negatives = (unit(draw, *s).requires_grad_() for s in ((3, 8), (3, 8), (3, 5, 8)))
    contrast_with_bank(embedding, positive, negatives, log_partition=1.0, bank=9).sum().backward()
    assert embedding.grad is not None and positive.grad is None and negatives.grad is None


def test_the_estimate_is_least_where_exp_score_over_z_is_the_chance_of_a_partner():
    """Partners by chances c_i of four items, and twelve negatives, three of each: `exp(score) / Z` becomes c_i."""
    chances, items = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64), torch.eye(4, dtype=torch.float64)
    scores = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([scores], max_iter=100)

    def expected_loss():
        optimiser.zero_grad()
        evenly = items.repeat(3, 1).expand(4, 12, 4)
        value = contrast_with_bank(scores.expand(4, 4), items, evenly, log_partition=0.0, bank=4, temperature=1.0)
        loss = (chances * value).sum()
        loss.backward()
        return loss

    optimiser.step(expected_loss)
    assert scores.exp().tolist() == pytest.approx(chances.tolist(), abs=1e-3)
