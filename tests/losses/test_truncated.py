"""Top-k with a tail bucket: a bound and not a bias."""

import pytest
import torch

from kdlm.losses import ForwardKL, bucket, forward_kl, generalised_jsd, on_bucket, reverse_kl, total_variation
from kdlm.losses.truncated import log1mexp
from kdlm.signal import TopK


def top(teacher, k):
    log_probs, ids = teacher.log_softmax(-1).topk(k, dim=-1)
    return TopK(ids, log_probs)


def test_the_buckets_are_distributions(draw):
    log_q, log_p = bucket(draw(5, 41), top(3 * draw(5, 41), 7))
    assert log_q.shape == log_p.shape == (5, 8)
    torch.testing.assert_close(log_q.exp().sum(-1), torch.ones(5).double())
    torch.testing.assert_close(log_p.exp().sum(-1), torch.ones(5).double())


def test_all_tokens_kept_give_the_full_divergence_and_gradient(divergence, draw):
    student, teacher = draw(5, 41).requires_grad_(), draw(5, 41)
    ours, full = on_bucket(divergence, student, top(teacher, 41)), divergence(student, teacher)
    torch.testing.assert_close(ours, full)
    torch.testing.assert_close(torch.autograd.grad(ours.sum(), student)[0], torch.autograd.grad(full.sum(), student)[0])


@pytest.mark.parametrize("f", [forward_kl, reverse_kl, generalised_jsd, total_variation])
def test_an_f_divergence_is_bounded_below_more_tightly_the_more_tokens_are_kept(draw, f):
    student, teacher = draw(50, 41), draw(50, 41)
    values = torch.stack([on_bucket(f, student, top(teacher, k)) for k in (1, 2, 5, 20, 40)] + [f(student, teacher)])
    assert (values.diff(dim=0) >= -1e-12).all()
    assert (values >= 0).all()


def test_what_the_bucket_leaves_out_is_the_divergence_inside_the_tail(draw):
    student, teacher = draw(41), draw(41)
    order = teacher.argsort(descending=True)
    tail = order[7:]
    inside = forward_kl(student[tail], teacher[tail]) * teacher.softmax(-1)[tail].sum()
    whole = on_bucket(forward_kl, student[None], top(teacher[None], 7))[0] + inside
    torch.testing.assert_close(whole, forward_kl(student, teacher))


def test_finite_differences_agree_with_the_gradient(differentiable, draw):
    signal = top(draw(3, 11), 4)
    student = draw(3, 11).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: on_bucket(differentiable, s, signal), student)


def test_its_minimiser_has_the_teachers_probabilities_where_renormalising_inflates_them(draw):
    teacher = draw(1, 9)
    signal = top(teacher, 3)
    kept = signal.log_probs.exp().sum()

    def minimise(loss):
        student = torch.zeros(1, 9, dtype=torch.float64, requires_grad=True)
        optimiser = torch.optim.LBFGS([student], max_iter=200, line_search_fn="strong_wolfe")

        def closure():
            optimiser.zero_grad()
            value = loss(student).sum()
            value.backward()
            return value

        optimiser.step(closure)
        return student.softmax(-1).detach().gather(-1, signal.ids)

    def renormalised(student):
        return -(signal.log_probs.exp() / kept * student.log_softmax(-1).gather(-1, signal.ids)).sum(-1)

    exact = signal.log_probs.exp()
    torch.testing.assert_close(minimise(lambda s: on_bucket(forward_kl, s, signal)), exact, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(minimise(renormalised), exact / kept, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_student_or_teacher_sure_of_one_token_gives_finite_gradients(divergence, dtype):
    sure = torch.full((1, 41), -1e4, dtype=dtype)
    sure[0, 3] = 1e4
    flat = torch.zeros(1, 41, dtype=dtype)
    for student, teacher in ((sure, flat), (flat, sure), (sure, sure)):
        leaf = student.clone().requires_grad_()
        value = on_bucket(divergence, leaf, top(teacher.float(), 5))
        assert value.isfinite().all()
        assert torch.autograd.grad(value.sum(), leaf)[0].isfinite().all()


def test_a_kept_id_beyond_the_students_vocabulary_counts_as_tail(draw):
    teacher = draw(5, 43)
    signal = top(teacher, 43)
    student = draw(5, 41)
    log_q, log_p = bucket(student, signal)
    outside = signal.ids >= 41
    torch.testing.assert_close(log_p[:, -1].exp(), (signal.log_probs.exp() * outside).sum(-1))
    assert (log_q.exp()[:, :-1][outside] == 0).all()


def test_a_temperature_is_refused_with_the_reason(divergence, draw):
    with pytest.raises(ValueError, match="tail is known as one mass only"):
        on_bucket(divergence, draw(5, 41), top(draw(5, 41), 3), temperature=2.0)
    with pytest.raises(ValueError, match="tail is known as one mass only"):
        ForwardKL(temperature=2.0)(draw(5, 41), top(draw(5, 41), 3))


def test_log1mexp_is_accurate_at_both_ends():
    exact = {
        -1e-12: -27.631021115929048,
        -1e-3: -6.908255237315471,
        -0.69: -0.6963042971440567,
        -0.7: -0.6863410028083851,
        -5.0: -0.006760749449488558,
        -50.0: -1.9287498479639178e-22,
    }
    x, expected = (torch.tensor(list(numbers), dtype=torch.float64) for numbers in (exact, exact.values()))
    torch.testing.assert_close(log1mexp(x), expected, rtol=1e-14, atol=0)
