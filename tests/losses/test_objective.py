"""The weighted sum of losses and the measures beside it, in one pass."""

import pytest
import torch

from kdlm.losses import (
    CrossEntropy,
    ForwardKL,
    ReverseKL,
    cross_entropy,
    forward_kl,
    measures_for,
    reverse_kl,
    sampled_cross_entropy,
    weighted_sum,
)
from kdlm.signal import Dense, Head, Hidden, Sampled, TopK

ROWS, VOCAB = 41, 127
FORWARD, REVERSE, CROSS = ForwardKL(temperature=2.0), ReverseKL(), CrossEntropy()


@pytest.fixture
def pair(draw):
    """Student, teacher and labels; the student's head is padded beyond the ids that both know."""
    hidden, weight = draw(ROWS, 6).requires_grad_(), draw(VOCAB + 9, 6).requires_grad_()
    teacher = Hidden(draw(ROWS, 10), Head(draw(VOCAB + 20, 10)))
    return Hidden(hidden, Head(weight)), teacher, torch.arange(ROWS)


def logits(model):
    return model.head.logits(model.hidden)


def gradients(rows, student):
    return torch.autograd.grad(rows.sum(), (student.hidden, student.head.weight), retain_graph=True)


def test_the_sum_has_the_values_and_gradients_of_its_terms(pair):
    student, teacher, labels = pair
    terms = [("forward_kl", FORWARD, 0.7), ("reverse_kl", REVERSE, 0.2), ("cross_entropy", CROSS, 0.1)]
    total, parts = weighted_sum(terms, student, teacher, labels, vocab=VOCAB, chunk_rows=7)
    z_s, z_t = logits(student), logits(teacher)
    expected = {
        "forward_kl": forward_kl(z_s[:, :VOCAB], z_t[:, :VOCAB], temperature=2.0),
        "reverse_kl": reverse_kl(z_s[:, :VOCAB], z_t[:, :VOCAB]),
        "cross_entropy": cross_entropy(z_s, labels),  # over the student's whole vocabulary
    }
    for name, rows in expected.items():
        torch.testing.assert_close(parts[name], rows.detach())
    plain = sum(weight * expected[name] for name, _, weight in terms)
    torch.testing.assert_close(total, plain)
    for found, right in zip(gradients(total, student), gradients(plain, student), strict=True):
        torch.testing.assert_close(found, right)


def test_a_term_of_weight_zero_is_measured_and_leaves_the_gradient(pair):
    student, teacher, labels = pair
    terms = [("forward_kl", FORWARD, 1.0), ("cross_entropy", CROSS, 0.0)]
    total, parts = weighted_sum(terms, student, teacher, labels, vocab=VOCAB)
    alone, _ = weighted_sum(terms[:1], student, teacher, labels, vocab=VOCAB)
    for found, right in zip(gradients(total, student), gradients(alone, student), strict=True):
        torch.testing.assert_close(found, right)
    torch.testing.assert_close(parts["cross_entropy"], cross_entropy(logits(student), labels).detach())
    nothing, _ = weighted_sum([("cross_entropy", CROSS, 0.0)], student, teacher, labels)
    assert all((x == 0).all() for x in gradients(nothing, student))


def test_the_measures_are_what_they_say_and_leave_the_gradient(pair):
    student, teacher, labels = pair
    terms = [("reverse_kl", REVERSE, 1.0)]
    total, parts = weighted_sum(
        terms, student, teacher, labels, vocab=VOCAB, measures=measures_for(Hidden), chunk_rows=7
    )
    z_s, z_t = logits(student).detach(), logits(teacher)
    q = z_s.softmax(-1)
    expected = {
        "cross_entropy": cross_entropy(z_s, labels),
        "kl_to_teacher": forward_kl(z_s[:, :VOCAB], z_t[:, :VOCAB]),
        "top1_agreement": (z_s[:, :VOCAB].argmax(-1) == z_t[:, :VOCAB].argmax(-1)).double(),
        "student_entropy": -(q * q.log()).sum(-1),
        "accuracy": (z_s.argmax(-1) == labels).double(),
        "teacher_cross_entropy": cross_entropy(z_t[:, :VOCAB], labels),
    }
    assert set(parts) == {"reverse_kl", *expected}
    for name, rows in expected.items():
        torch.testing.assert_close(parts[name], rows)
        assert not parts[name].requires_grad
    bare, _ = weighted_sum(terms, student, teacher, labels, vocab=VOCAB)
    for found, right in zip(gradients(total, student), gradients(bare, student), strict=True):
        torch.testing.assert_close(found, right)


def test_shared_ids_may_be_a_list(pair):
    student, teacher, labels = pair
    ids = torch.arange(0, VOCAB, 3)
    terms = [("forward_kl", FORWARD, 1.0), ("cross_entropy", CROSS, 1.0)]
    total, parts = weighted_sum(terms, student, teacher, labels, vocab=ids, measures=["teacher_cross_entropy"])
    known = torch.isin(labels, ids)
    unknown_is_infinite = cross_entropy(logits(teacher)[:, ids], torch.searchsorted(ids, labels)).where(
        known, torch.inf
    )
    torch.testing.assert_close(parts["teacher_cross_entropy"], unknown_is_infinite)
    z_s, z_t = logits(student), logits(teacher)
    expected = forward_kl(z_s[:, ids], z_t[:, ids], temperature=2.0) + cross_entropy(z_s, labels)
    torch.testing.assert_close(total, expected)
    for found, right in zip(gradients(total, student), gradients(expected, student), strict=True):
        torch.testing.assert_close(found, right)


def test_top_k_sampled_dense_and_no_teacher_each_give_what_they_can(pair):
    student, teacher, labels = pair
    z_s, z_t = logits(student), logits(teacher)[:, :VOCAB]
    log_probs, ids = z_t.log_softmax(-1).topk(5)
    terms = [("forward_kl", ForwardKL(), 1.0)]

    def run(signal, terms=terms):
        measures = measures_for(None if signal is None else type(signal))
        return weighted_sum(terms, student, signal, labels, vocab=VOCAB, measures=measures)

    _, dense = run(Dense(z_t))
    _, top = run(TopK(ids, log_probs))
    torch.testing.assert_close(top["top1_agreement"], dense["top1_agreement"])
    assert (top["kl_to_teacher"] <= dense["kl_to_teacher"]).all()
    sampled = Sampled(ids, log_probs.exp())
    total, parts = run(sampled)
    torch.testing.assert_close(total, sampled_cross_entropy(z_s[:, :VOCAB], sampled))
    assert "kl_to_teacher" not in parts
    total, parts = run(None, [("cross_entropy", CROSS, 1.0)])
    torch.testing.assert_close(total, cross_entropy(z_s, labels))
    assert set(parts) == {"cross_entropy", "student_entropy", "accuracy"}


def test_no_rows_give_zero_with_zero_gradients(pair):
    student, teacher, labels = pair
    nobody = Hidden(student.hidden[:0], student.head)
    total, parts = weighted_sum(
        [("forward_kl", FORWARD, 1.0)],
        nobody,
        Hidden(teacher.hidden[:0], teacher.head),
        labels[:0],
        vocab=VOCAB,
        measures=measures_for(Hidden),
    )
    total.sum().backward()
    assert total.sum() == 0 and (student.head.weight.grad == 0).all()
    assert set(parts) == {"forward_kl", *measures_for(Hidden)}
    assert all(rows.shape == (0,) for rows in parts.values())


def test_mistakes_are_refused(pair):
    student, teacher, labels = pair
    terms = [("forward_kl", FORWARD, 1.0)]
    with pytest.raises(ValueError, match="different names"):
        weighted_sum(terms * 2, student, teacher, labels, vocab=VOCAB)
    with pytest.raises(ValueError, match="pass vocab="):
        weighted_sum(terms, student, teacher, labels)
    with pytest.raises(ValueError, match="there are cross_entropy"):
        weighted_sum(terms, student, teacher, labels, vocab=VOCAB, measures=["perplexity"])
    with pytest.raises(ValueError, match="no teacher"):
        weighted_sum([("cross_entropy", CROSS, 1.0)], student, None, labels, measures=["kl_to_teacher"])
