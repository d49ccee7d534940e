"""The wrapper gives what plain autograd gives, without its tensors."""

import pytest
import torch
from kdlm_kernels.distribution import BLOCK
from linear_pair import ROWS, STUDENT, TEACHER, VOCAB, Allocations, assert_same, leaves, logits

from kdlm.losses import chunked, cross_entropy, forward_kl, generalised_jsd, total_variation
from kdlm.signal import Dense, Head, Hidden, Sampled, TopK


def test_every_divergence_has_the_value_and_gradients_of_plain_autograd(divergence, models):
    student, teacher = models(bias=True)
    assert_same(chunked(divergence, student, teacher), divergence(logits(student), logits(teacher)), student)


def test_finite_differences_agree_with_the_gradient(differentiable, draw):
    teacher = Hidden(draw(3, 2), Head(draw(5, 2)))
    inputs = draw(3, 2).requires_grad_(), draw(5, 2).requires_grad_(), draw(5).requires_grad_()

    def rows(hidden, weight, bias):
        return chunked(differentiable, Hidden(hidden, Head(weight, bias)), teacher, chunk_rows=2)

    assert torch.autograd.gradcheck(lambda *x: rows(*x).sum(), inputs)  # made in forward
    assert torch.autograd.gradcheck(rows, inputs)  # made again, from a gradient per row


@pytest.mark.parametrize("chunk_rows", [1, 2, 40, 41, 1000])
def test_the_size_of_a_chunk_is_inert(models, chunk_rows):
    student, teacher = models()
    expected = forward_kl(logits(student), logits(teacher))
    assert_same(chunked(forward_kl, student, teacher, chunk_rows=chunk_rows), expected, student)


def test_blocks_smaller_than_a_chunk_are_inert(models, monkeypatch):
    student, teacher = models()
    monkeypatch.setitem(BLOCK, "cpu", 3 * VOCAB)
    expected = generalised_jsd(logits(student), logits(teacher))
    assert_same(chunked(generalised_jsd, student, teacher, chunk_rows=7), expected, student)


def test_a_gradient_that_differs_per_row_is_honoured(models, draw):
    student, teacher = models()
    expected = forward_kl(logits(student), logits(teacher))
    assert_same(chunked(forward_kl, student, teacher), expected, student, upstream=draw(ROWS))


def test_weights_of_rows_multiply_value_and_gradient(models, draw):
    student, teacher = models()
    weights = draw(ROWS)
    expected = forward_kl(logits(student), logits(teacher)) * weights
    ours = chunked(forward_kl, student, teacher, weights=weights, chunk_rows=7)
    torch.testing.assert_close(ours, expected)
    for reduce in (torch.sum, torch.mean, lambda x: (x * weights).sum()):
        found = torch.autograd.grad(reduce(ours), leaves(student), retain_graph=True)
        plain = torch.autograd.grad(reduce(expected), leaves(student), retain_graph=True)
        for a, b in zip(found, plain, strict=True):
            torch.testing.assert_close(a, b)


def test_a_sum_or_a_mean_runs_the_loss_once(models):
    student, teacher = models()
    rows_seen = 0

    def counting(z_s, z_t):
        nonlocal rows_seen
        rows_seen += len(z_s)
        return forward_kl(z_s, z_t)

    for reduce in (torch.sum, torch.mean, lambda x: x.sum() / 7):
        rows_seen = 0
        reduce(chunked(counting, student, teacher)).backward()
        assert rows_seen == ROWS


def test_backward_twice_gives_the_gradient_twice(models):
    student, teacher = models()
    value = chunked(forward_kl, student, teacher).sum() / 3
    value.backward(retain_graph=True)
    once = student.head.weight.grad.clone()
    value.backward()
    torch.testing.assert_close(student.head.weight.grad, 2 * once)


def test_differentiating_twice_is_refused(models):
    student, teacher = models()
    value = chunked(forward_kl, student, teacher).sum()
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(value, student.hidden, create_graph=True)


@pytest.mark.parametrize("head", [{"softcap": 3.0}, {"logit_scale": 0.25}, {"softcap": 3.0, "logit_scale": 2.0}])
@pytest.mark.parametrize("bias", [False, True])
def test_softcap_scale_and_bias_are_part_of_the_chain(models, head, bias):
    student, teacher = models(bias=bias, **head)
    teacher = Hidden(teacher.hidden, Head(teacher.head.weight, **head))
    expected = generalised_jsd(logits(student), logits(teacher))
    assert_same(chunked(generalised_jsd, student, teacher, chunk_rows=7), expected, student)


def test_dense_student_and_dense_teacher_work_too(models):
    student, teacher = models()
    z_s, z_t = logits(student).detach().requires_grad_(), logits(teacher)
    expected = forward_kl(z_s, z_t)
    for signal in (teacher, Dense(z_t)):
        ours = chunked(forward_kl, Dense(z_s), signal, chunk_rows=7)
        torch.testing.assert_close(ours, expected)
        (found,) = torch.autograd.grad(ours.sum(), z_s, retain_graph=True)
        torch.testing.assert_close(found, torch.autograd.grad(expected.sum(), z_s, retain_graph=True)[0])
    assert_same(chunked(forward_kl, student, Dense(z_t)), forward_kl(logits(student), z_t), student)


def test_top_k_samples_and_labels_are_cut_into_the_same_rows(models):
    student, teacher = models()
    log_probs, ids = logits(teacher).log_softmax(-1).topk(5)
    labels = torch.arange(ROWS)

    def loss(z, signal, rows):
        return cross_entropy(z, rows) + z.gather(-1, signal.ids).sum(-1)

    expected = cross_entropy(logits(student), labels) + logits(student).gather(-1, ids).sum(-1)
    for signal in (TopK(ids, log_probs), Sampled(ids, log_probs.exp())):
        assert_same(chunked(loss, student, signal, labels, chunk_rows=7), expected, student)
    alone = chunked(lambda z, teacher, rows: cross_entropy(z, rows), student, None, labels)
    assert_same(alone, cross_entropy(logits(student), labels), student)


def test_a_divergence_of_your_own_gets_the_same(models):
    student, teacher = models()

    def hellinger(z_s, z_t):
        return 1 - ((z_s.log_softmax(-1) + z_t.log_softmax(-1)) / 2).exp().sum(-1)

    assert_same(
        chunked(hellinger, student, teacher, chunk_rows=7), hellinger(logits(student), logits(teacher)), student
    )


def test_a_loss_that_leaves_the_student_out_gives_zero_gradients(models):
    student, teacher = models()
    chunked(lambda z_s, z_t: z_t.logsumexp(-1), student, teacher).sum().backward()
    assert all((x.grad == 0).all() for x in leaves(student))


def test_by_products_come_without_gradient(models):
    student, teacher = models()

    def loss(z_s, z_t):
        return forward_kl(z_s, z_t), {"tvd": total_variation(z_s, z_t), "sure": z_s.argmax(-1)}

    _, aux = chunked(loss, student, teacher, chunk_rows=7, has_aux=True)
    torch.testing.assert_close(aux["tvd"], total_variation(logits(student), logits(teacher)).detach())
    torch.testing.assert_close(aux["sure"], logits(student).argmax(-1).double())
    assert not any(x.requires_grad for x in aux.values())


@pytest.mark.parametrize("chunk_rows", [None, 1, 7])
def test_no_rows_give_zero_with_zero_gradients(divergence, models, chunk_rows):
    student, teacher = models(rows=0, bias=True)
    value = chunked(divergence, student, teacher, chunk_rows=chunk_rows)
    assert value.shape == (0,)
    value.sum().backward()
    assert value.sum() == 0 and all((x.grad == 0).all() for x in leaves(student))


def test_strides_of_the_inputs_are_inert(models, draw):
    hidden, weight = draw(STUDENT, ROWS).requires_grad_(), draw(STUDENT, 2 * VOCAB).requires_grad_()
    student = Hidden(hidden.T, Head(weight.T[::2]))
    _, teacher = models()
    teacher = Hidden(draw(TEACHER, ROWS).T, Head(draw(TEACHER, VOCAB).T))
    ours, expected = chunked(forward_kl, student, teacher), forward_kl(logits(student), logits(teacher))
    torch.testing.assert_close(ours, expected)
    found = torch.autograd.grad(ours.sum(), (hidden, weight))
    for a, b in zip(found, torch.autograd.grad(expected.sum(), (hidden, weight)), strict=True):
        torch.testing.assert_close(a, b)


def test_no_tensor_over_rows_and_vocabulary_is_ever_made(divergence, models):
    student, teacher = models(rows=200)
    with Allocations(*leaves(student), teacher.head.weight) as seen:
        chunked(divergence, student, teacher, chunk_rows=10).sum().backward()
    assert max(seen.sizes) == 10 * VOCAB  # more than a head, which is 6 or 10 wide


@pytest.mark.parametrize("frozen", ["parameter", "no_grad"])
def test_a_frozen_head_gets_and_allocates_no_gradient(models, frozen):
    student, teacher = models()
    if frozen == "parameter":
        student.head.weight.requires_grad_(False)
    with Allocations(student.head.weight, teacher.head.weight) as seen, torch.set_grad_enabled(frozen == "parameter"):
        value = chunked(forward_kl, student, teacher, chunk_rows=2).sum()
        if frozen == "parameter":
            value.backward()
    assert student.head.weight.grad is None
    assert max(seen.sizes) == 2 * VOCAB < student.head.weight.numel()
    assert value.requires_grad == (frozen == "parameter")
    expected = forward_kl(logits(student), logits(teacher)).sum()
    torch.testing.assert_close(value.detach(), expected.detach())
    if frozen == "parameter":
        torch.testing.assert_close(student.hidden.grad, torch.autograd.grad(expected, student.hidden)[0])


@pytest.mark.parametrize("vocab", [1200, torch.arange(3, 1271, 2)])
@pytest.mark.parametrize("teacher_vocab", [1271, 1300])
def test_both_vocabularies_are_cut_to_the_shared_ids_before_the_softmax(models, vocab, teacher_vocab):
    student, teacher = models(teacher_vocab=teacher_vocab)
    shared = torch.arange(vocab) if isinstance(vocab, int) else vocab
    expected = forward_kl(logits(student)[:, shared], logits(teacher)[:, shared])
    assert_same(chunked(forward_kl, student, teacher, vocab=vocab, chunk_rows=7), expected, student)
    assert_same(chunked(forward_kl, student, Dense(logits(teacher)), vocab=vocab), expected, student)
    dense = chunked(forward_kl, Dense(logits(student)), teacher, vocab=vocab)
    torch.testing.assert_close(dense, expected)


def test_heads_of_different_padding_equal_the_run_on_equal_sizes(models):
    student, teacher = models(vocab=64, teacher_vocab=80)
    equal = Hidden(teacher.hidden, teacher.head.cut(64))
    expected = chunked(forward_kl, student, equal)
    assert_same(chunked(forward_kl, student, teacher, vocab=64), expected, student)


def test_vocabularies_that_cannot_be_compared_are_refused(models):
    student, teacher = models(teacher_vocab=1300)
    with pytest.raises(ValueError, match="1271 ids and the teacher 1300"):
        chunked(forward_kl, student, teacher)
    with pytest.raises(ValueError, match="student scores 1271"):
        chunked(forward_kl, student, teacher, vocab=1300)
    with pytest.raises(ValueError, match="list of shared ids"):
        log_probs, ids = logits(teacher).log_softmax(-1).topk(5)
        chunked(forward_kl, student, TopK(ids, log_probs), vocab=torch.arange(5))


def test_a_loss_that_reduces_is_refused(models):
    student, teacher = models()
    with pytest.raises(ValueError, match="one value per row"):
        chunked(lambda z_s, z_t: forward_kl(z_s, z_t).mean(), student, teacher)


@pytest.mark.usefixtures("unchecked_types")
def test_an_implementation_that_does_not_exist_is_refused(models):
    student, teacher = models()
    torch.testing.assert_close(
        chunked(forward_kl, student, teacher, impl="torch"), chunked(forward_kl, student, teacher, impl="auto")
    )
    with pytest.raises(ValueError, match="impl must be"):
        chunked(forward_kl, student, teacher, impl="cuda")
    with pytest.raises(ValueError, match="no kernel"):
        chunked(lambda z_s, z_t: forward_kl(z_s, z_t), student, teacher, impl="triton")


def test_a_chunk_of_no_rows_is_refused(models):
    student, teacher = models()
    with pytest.raises(ValueError, match="chunk_rows"):
        chunked(forward_kl, student, teacher, chunk_rows=0)
