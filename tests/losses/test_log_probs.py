"""Log-probabilities of the text's own tokens, from every signal that has them."""

import pytest
import torch
from linear_pair import Allocations

from kdlm.losses import teacher_log_probs, token_log_probs
from kdlm.signal import Dense, LogProbs, Mixture, Sampled, TopK


def of_labels(logits, labels):
    return logits.log_softmax(-1).gather(-1, labels[:, None]).squeeze(-1)


def logits_of(signal):
    return signal.head.logits(signal.hidden)


@pytest.mark.parametrize("options", [{}, {"bias": True, "softcap": 5.0, "logit_scale": 0.5}])
@pytest.mark.parametrize("chunk_rows", [None, 2])
def test_hidden_states_give_what_their_logits_give_with_its_gradient(models, options, chunk_rows):
    student, _ = models(**options)
    labels = torch.randint(0, student.vocab_size, (len(student.hidden),))
    leaves = [x for x in (student.hidden, student.head.weight, student.head.bias) if x is not None]
    logits = logits_of(student)
    log_q = logits.log_softmax(-1)
    expected = of_labels(logits, labels), -(log_q.exp() * log_q).sum(-1)
    upstream = torch.randn(2, len(labels), dtype=torch.float64)

    def gradients(pair):
        return torch.autograd.grad((upstream[0] * pair[0] + upstream[1] * pair[1]).sum(), leaves, retain_graph=True)

    for signal in (student, Dense(logits)):
        found = token_log_probs(signal, labels, chunk_rows=chunk_rows)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(gradients(found), gradients(expected))


def test_every_kind_of_teacher_gives_the_same_number_without_gradient(models):
    _, teacher = models()
    teacher.hidden.requires_grad_()
    logits = logits_of(teacher)
    labels = torch.randint(0, teacher.vocab_size, (len(logits),))
    expected = of_labels(logits, labels).detach()
    alone = Mixture((teacher,), torch.zeros(len(logits), 1, dtype=torch.float64))
    for signal in (teacher, Dense(logits), alone, LogProbs(expected)):
        found = teacher_log_probs(signal, labels, chunk_rows=3)
        assert not found.requires_grad
        torch.testing.assert_close(found, expected)


def test_a_mixture_gives_the_logarithm_of_the_mean_probability(models):
    first, second = models()
    labels = torch.randint(0, first.vocab_size, (len(first.hidden),))
    log_weights = torch.tensor([0.3, 0.7], dtype=torch.float64).log().expand(len(labels), 2)
    found = teacher_log_probs(Mixture((first, second), log_weights), labels)
    parts = [of_labels(logits_of(x), labels).exp() for x in (first, second)]
    torch.testing.assert_close(found, (0.3 * parts[0] + 0.7 * parts[1]).log().detach())


@pytest.mark.parametrize("kind", ["hidden", "dense", "mixture"])
@pytest.mark.parametrize("listed", [False, True])
def test_only_shared_ids_share_the_mass_and_a_label_that_is_none_of_them_has_no_probability(models, kind, listed):
    _, teacher = models()
    logits, ids = logits_of(teacher), torch.arange(3, teacher.vocab_size, 2) if listed else torch.arange(30)
    labels = torch.randint(0, teacher.vocab_size, (len(logits),))
    labels[0], labels[1] = ids[-1], ids[-1] + 1
    zeros = torch.zeros(len(labels), 1, dtype=torch.float64)
    signal = {"hidden": teacher, "dense": Dense(logits), "mixture": Mixture((teacher,), zeros)}[kind]
    found = teacher_log_probs(signal, labels, vocab=ids if listed else 30)
    log_p = torch.full_like(logits, -torch.inf).index_copy(1, ids, logits[:, ids].log_softmax(-1))
    torch.testing.assert_close(found, log_p.gather(1, labels[:, None]).squeeze(1))
    assert found[1] == -torch.inf and found[0].isfinite()


@pytest.mark.parametrize("kind", ["hidden", "mixture", "log_probs"])
def test_no_rows_give_no_numbers(models, kind):
    student, teacher = models(rows=0)
    labels = torch.zeros(0, dtype=torch.int64)
    log_q, entropy = token_log_probs(student, labels)
    assert log_q.shape == entropy.shape == (0,)
    (gradient,) = torch.autograd.grad(log_q.sum(), student.head.weight)
    assert not gradient.any()
    mixture = Mixture((teacher,), torch.zeros(0, 1, dtype=torch.float64))
    signal = {"hidden": teacher, "mixture": mixture, "log_probs": LogProbs(torch.zeros(0))}[kind]
    assert teacher_log_probs(signal, labels).shape == (0,)


def test_a_teacher_that_may_not_know_the_token_is_refused_by_name(draw):
    ids = torch.zeros(4, 2, dtype=torch.int64)
    for signal in (TopK(ids, draw(4, 2)), Sampled(ids, draw(4, 2))):
        with pytest.raises(ValueError, match=f"got a {type(signal).__name__} signal"):
            teacher_log_probs(signal, ids[:, 0])
    with pytest.raises(ValueError, match="got no teacher"):
        teacher_log_probs(None, ids[:, 0])


def test_no_tensor_of_rows_times_vocabulary_is_made(models):
    student, teacher = models()
    labels = torch.zeros(len(student.hidden), dtype=torch.int64)
    with Allocations(student.head.weight, teacher.head.weight) as made:
        log_q, _ = token_log_probs(student, labels, chunk_rows=4)
        torch.autograd.grad(log_q.sum(), student.hidden)
        teacher_log_probs(teacher, labels, chunk_rows=4)
        mixture = Mixture((teacher, teacher), torch.zeros(len(labels), 2, dtype=torch.float64))
        teacher_log_probs(mixture, labels, chunk_rows=4)
    assert max(made.sizes) < len(labels) * student.vocab_size / 4
