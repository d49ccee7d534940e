"""TVD++: the value of total variation, and its policy gradient with standardised rewards."""

import pytest
import torch

from kdlm.losses import total_variation, tvd_plus_plus
from kdlm.losses.tvd import standardised


def gradient(function, student, teacher, **options):
    student = student.detach().requires_grad_()
    return torch.autograd.grad(function(student, teacher, **options).sum(), student)[0]


def test_the_value_is_the_total_variation_distance(draw):
    student, teacher = draw(50, 17), 2 * draw(50, 17)
    assert torch.equal(tvd_plus_plus(student, teacher), total_variation(student, teacher))


def test_advantages_have_mean_zero_and_spread_one_under_the_student(draw):
    q, p = (3 * draw(50, 17)).softmax(-1), (3 * draw(50, 17)).softmax(-1)
    advantage = standardised((p > q).double(), q)
    assert (q * advantage).sum(-1).abs().max() < 1e-12
    spread = (q * advantage.square()).sum(-1).sqrt()
    mass = (q * (p > q)).sum(-1)
    deviation = (mass * (1 - mass)).sqrt()
    torch.testing.assert_close(spread, deviation / (deviation + 1e-5))
    assert (spread > 0.99).all()


def test_the_gradient_is_the_policy_gradient_with_these_advantages(draw):
    """Also as a mean over tokens that are enumerated, one backward pass each."""
    student, teacher = draw(6, 11).requires_grad_(), draw(6, 11)
    q, p = student.softmax(-1).detach(), teacher.softmax(-1)
    advantage = standardised((p > q).double(), q)
    expected = torch.zeros_like(student)
    for token in range(11):
        (score,) = torch.autograd.grad(student.log_softmax(-1)[:, token].sum(), student)
        expected -= (q * advantage)[:, token : token + 1] * score
    torch.testing.assert_close(gradient(tvd_plus_plus, student, teacher), expected)


def test_rewards_less_any_constant_give_the_gradient_of_total_variation(draw):
    student, teacher = draw(6, 11).requires_grad_(), draw(6, 11)
    q, p = student.softmax(-1).detach(), teacher.softmax(-1)
    for baseline in (0.0, 0.4, -7.0):
        surrogate = -(q * ((p > q).double() - baseline) * student.log_softmax(-1)).sum()
        ours = torch.autograd.grad(surrogate, student)[0]
        torch.testing.assert_close(ours, gradient(total_variation, student, teacher))


def test_each_row_has_the_direction_of_total_variation_over_the_spread_of_its_rewards(draw):
    student, teacher = 2 * draw(50, 17), 2 * draw(50, 17)
    q, p = student.softmax(-1), teacher.softmax(-1)
    mass = (q * (p > q)).sum(-1, keepdim=True)
    plain = gradient(total_variation, student, teacher)
    torch.testing.assert_close(gradient(tvd_plus_plus, student, teacher), plain / ((mass * (1 - mass)).sqrt() + 1e-5))


def test_rows_do_not_depend_on_each_other(draw):
    student, teacher = draw(9, 17), draw(9, 17)
    alone = torch.cat([gradient(tvd_plus_plus, student[i : i + 1], teacher[i : i + 1]) for i in range(9)])
    assert torch.equal(gradient(tvd_plus_plus, student, teacher), alone)


def test_rewards_that_all_agree_give_no_gradient_and_no_nan(draw):
    for reward in (0.0, 1.0):
        q = draw(5, 17).softmax(-1)
        assert (standardised(torch.full_like(q, reward), q).abs() < 1e-9).all()
    z = draw(5, 17)
    assert gradient(tvd_plus_plus, z, z).abs().max() == 0  # p > q nowhere
    sure = torch.tensor([[200.0, 0.0, 0.0]])  # q is one-hot in fp32: no mass where p > q
    assert gradient(tvd_plus_plus, sure, torch.tensor([[0.0, 9.0, 9.0]])).abs().max() < 1e-6


def test_the_gradient_is_bounded_by_the_temperature(draw):
    for temperature in (0.5, 1.0, 3.0):
        found = gradient(tvd_plus_plus, 9 * draw(200, 17), 9 * draw(200, 17), temperature=temperature)
        assert found.abs().sum(-1).max() <= temperature + 1e-9


def test_a_row_where_the_student_has_little_of_what_it_lacks_is_lifted():
    """The teacher wants a token to which the student gives 1e-4: the gradient grows a hundredfold."""
    student = torch.tensor([[0.9998, 1e-4, 1e-4]], dtype=torch.float64).log()
    teacher = torch.tensor([[0.2, 0.79995, 0.5e-4]], dtype=torch.float64).log()
    plus, plain = (gradient(f, student, teacher)[0, 1].item() for f in (tvd_plus_plus, total_variation))
    assert plain < 0 and 90 < plus / plain < 100


def decode(draft, target, calls, *, ahead=4):
    """Sample speculatively from tables `[last, next]`: how often each pair was emitted, and tokens for each call."""
    generator = torch.Generator().manual_seed(0)
    q, p = draft.softmax(-1), target.softmax(-1)
    pairs, vocab = torch.zeros_like(p), len(p)
    last = torch.randint(0, vocab, (calls[0],), generator=generator)
    for _ in range(calls[1]):
        going = torch.ones_like(last, dtype=torch.bool)
        for step in range(ahead + 1):  # the last step draws from the target after a run of accepted tokens
            offered = torch.multinomial(q[last], 1, generator=generator).squeeze(-1)
            chance = (p / q)[last, offered] if step < ahead else torch.zeros(len(last))
            accepted = torch.rand(len(last), generator=generator, dtype=p.dtype) < chance
            rest = (p - q)[last].clamp(min=0) + 1e-300 if step < ahead else p[last]
            drawn = torch.where(accepted, offered, torch.multinomial(rest, 1, generator=generator).squeeze(-1))
            pairs.index_put_((last[going], drawn[going]), torch.ones(int(going.sum()), dtype=p.dtype), accumulate=True)
            last, going = torch.where(going, drawn, last), going & accepted
    return pairs, pairs.sum().item() / (calls[0] * calls[1])


@pytest.mark.parametrize("scale", [0.3, 4.0])  # a draft that knows nothing, and one that is sure of the wrong tokens
def test_a_draft_that_is_trained_with_it_has_more_tokens_accepted(draw, scale):
    target, draft = 2 * draw(17, 17), (scale * draw(17, 17)).requires_grad_()
    before = decode(draft.detach(), target, (300, 5))[1]
    optimizer = torch.optim.Adam([draft], lr=0.05)
    for _ in range(150):
        optimizer.zero_grad()
        tvd_plus_plus(draft, target).mean().backward()
        optimizer.step()
    pairs, after = decode(draft.detach(), target, (300, 20))
    assert after > before + 1 and after <= 5
    # What comes out is the target's text, whatever the draft: chi-square over tokens that are expected often enough.
    expected = pairs.sum(-1, keepdim=True) * target.softmax(-1)
    often = expected > 5
    statistic, freedom = ((pairs - expected)[often] ** 2 / expected[often]).sum().item(), int(often.sum()) - 17
    assert abs(statistic - freedom) < 4 * (2 * freedom) ** 0.5
