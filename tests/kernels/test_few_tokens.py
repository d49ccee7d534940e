"""Teachers known by a few tokens, and log-probabilities of given ones: only the student is projected."""

import pytest
import torch
from kdlm_kernels import Head, Term, linear_logprobs, linear_topk_divergence
from reference import CASES, assert_same, leaves, logits

import kdlm.losses
from kdlm.signal import Sampled, TopK

LABELS = torch.tensor([3, 300, -100, 290, 0])


@pytest.fixture
def student(models):
    return models(logit_scale=0.7, softcap=5.0)[:2]


def top_k(rows=5, vocab=301, k=4):
    log_probs = torch.randn(rows, vocab, dtype=torch.float64).log_softmax(-1)
    return log_probs.topk(k).indices, log_probs.topk(k).values


@pytest.mark.parametrize("name", [name for name in CASES if name != "taid_kl"])
def test_top_k_is_compared_with_the_rest_in_one_bucket(student, impl, name):
    name, options = CASES[name]
    ids, log_probs = top_k()
    ids[0, 1] = 305  # a teacher with a longer head: tail on both sides
    ours = linear_topk_divergence(*student, ids, log_probs, divergence=name, chunk_rows=2, impl=impl, **options)
    expected = kdlm.losses.on_bucket(getattr(kdlm.losses, name), logits(*student), TopK(ids, log_probs), **options)
    assert_same(ours, expected, leaves(*student))


def test_samples_and_labels_and_by_products_come_in_one_pass(student, impl):
    ids, counts = torch.randint(0, 301, (5, 6)), torch.randint(0, 3, (5, 6)).double()
    counts[1] = 0  # a row without a draw
    terms = [Term("forward_kl", 0.6), Term("cross_entropy", 0.3)]
    total, parts = linear_topk_divergence(
        *student, ids, counts=counts, divergence=terms, labels=LABELS, measures=["student_entropy", "accuracy"],
        chunk_rows=2, impl=impl,
    )  # fmt: skip
    z = logits(*student)
    sampled = kdlm.losses.sampled_cross_entropy(z, Sampled(ids, counts))
    plain = kdlm.losses.cross_entropy(z, LABELS)
    assert_same(total, 0.6 * sampled + 0.3 * plain, leaves(*student))
    assert list(parts) == ["forward_kl", "cross_entropy", "student_entropy", "accuracy"]
    torch.testing.assert_close(parts["cross_entropy"], plain.detach())
    torch.testing.assert_close(parts["student_entropy"], torch.distributions.Categorical(logits=z).entropy().detach())
    torch.testing.assert_close(parts["accuracy"], (z.argmax(-1) == LABELS).double())


def test_weights_and_a_gradient_per_row_are_honoured(student, impl):
    ids, log_probs = top_k()
    weights, upstream = torch.rand(5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    ours = linear_topk_divergence(*student, ids, log_probs, weights=weights, impl=impl)
    expected = weights * kdlm.losses.on_bucket(kdlm.losses.forward_kl, logits(*student), TopK(ids, log_probs))
    assert_same(ours, expected, leaves(*student))
    assert_same(ours, expected, leaves(*student), upstream=upstream)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("which", ["log_probs", "entropy", "both"])
def test_log_probabilities_and_entropy_have_their_gradients(student, impl, temperature, which):
    ids = torch.randint(0, 301, (5, 3))
    ids[2] = ids[2, 0]  # one token asked for three times
    log_probs, entropy = linear_logprobs(*student, ids, temperature=temperature, chunk_rows=2, impl=impl)
    logs = (logits(*student) / temperature).log_softmax(-1)
    expected, expected_entropy = logs.gather(1, ids), -(logs.exp() * logs).sum(-1)
    torch.testing.assert_close(log_probs, expected)
    torch.testing.assert_close(entropy, expected_entropy)
    upstream = torch.randn(5, 3, dtype=torch.float64)

    def loss(of_tokens, of_entropy):
        chosen = {"log_probs": [0], "entropy": [1], "both": [0, 1]}[which]
        return sum([(of_tokens.exp() * upstream).sum(), of_entropy.square().sum()][part] for part in chosen)

    found, plain = (
        torch.autograd.grad(loss(*pair), leaves(*student))
        for pair in ((log_probs, entropy), (expected, expected_entropy))
    )
    for a, b in zip(found, plain, strict=True):
        torch.testing.assert_close(a, b)


def test_what_is_kept_for_backward_goes_with_the_loss(student):
    import gc
    import weakref

    log_probs, _ = linear_logprobs(*student, torch.zeros(5, 1, dtype=torch.int64))
    kept = weakref.ref(log_probs)
    gc.disable()  # no cycle may need the collector
    try:
        del log_probs, _
        assert kept() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("n", [0, 1])
def test_no_rows_and_one_row_are_no_different(models, impl, n):
    hidden, head, *_ = models(rows=n)
    ids, log_probs = top_k(rows=n)
    ours, parts = linear_topk_divergence(hidden, head, ids, log_probs, measures=["student_entropy"], impl=impl)
    expected = kdlm.losses.on_bucket(kdlm.losses.forward_kl, logits(hidden, head), TopK(ids, log_probs))
    assert_same(ours, expected, leaves(hidden, head))
    assert [len(x) for x in parts.values()] == [n, n]
    assert linear_logprobs(hidden, head, ids, impl=impl)[0].shape == (n, 4)


def test_what_a_few_tokens_cannot_say_is_refused(student):
    ids, log_probs = top_k()
    with pytest.raises(ValueError, match="either log_probs"):
        linear_topk_divergence(*student, ids)
    with pytest.raises(ValueError, match=r"temperature 2.0 on a top-k teacher"):
        linear_topk_divergence(*student, ids, log_probs, temperature=2.0)
    with pytest.raises(ValueError, match="reverse_kl on samples"):
        linear_topk_divergence(*student, ids, counts=torch.ones_like(log_probs), divergence="reverse_kl")
    with pytest.raises(ValueError, match="needs the teacher's whole distribution"):
        linear_topk_divergence(*student, ids, log_probs, measures=["top1_agreement"])
    with pytest.raises(ValueError, match="need labels="):
        linear_topk_divergence(*student, ids, log_probs, divergence="cross_entropy")
    with pytest.raises(ValueError, match="5 rows, log_probs 4"):
        linear_topk_divergence(*student, ids, log_probs[:4])
    with pytest.raises(ValueError, match="id 301 is outside the vocabulary of 301"):
        linear_logprobs(*student, ids.clone().fill_(301))
    with pytest.raises(ValueError, match="temperature must be positive"):
        linear_logprobs(*student, ids, temperature=0.0)
    hidden, head = student
    with pytest.raises(ValueError, match=r"\[rows, width\]"):
        linear_logprobs(hidden[None], Head(head.weight), ids)
