"""A mixture of teachers gives every loss what its explicit `[rows, vocab]` average gives, without that tensor."""

import pytest
import torch
from kdlm_kernels.distribution import BLOCK
from linear_pair import ROWS, VOCAB, Allocations, assert_same, leaves, logits

from kdlm.losses import CrossEntropy, ForwardKL, ReverseKL, chunked, forward_kl, measures_for, reverse_kl, weighted_sum
from kdlm.signal import Dense, Head, Hidden, Mixture

WIDTHS = (5, 9, 4)
SPACES = ("probability", "log")


@pytest.fixture
def mixture(draw):
    """A mixture of two `Hidden` members and a `Dense` one, with weights of its own in every row; float64."""

    def build(rows=ROWS, vocab=VOCAB, space="probability", confidence=None, sizes=None, dtype=torch.float64):
        sizes = sizes or [vocab] * 3
        members = [
            Hidden(draw(rows, width, dtype=dtype), Head(draw(n, width, dtype=dtype), draw(n, dtype=dtype), 0.5, cap))
            for n, width, cap in zip(sizes[:2], WIDTHS, (None, 3.0), strict=False)
        ]
        members.append(Dense(2 * draw(rows, sizes[2], dtype=dtype)))
        return Mixture(tuple(members), draw(rows, 3, dtype=dtype).log_softmax(1), space, confidence)

    return build


def whole(member):
    return logits(member) if isinstance(member, Hidden) else member.logits


def average(mixture, vocab=None):
    """The definition, on whole tensors: log-probabilities [rows, ids]."""
    shared = slice(None) if vocab is None else slice(vocab) if isinstance(vocab, int) else vocab
    log_p = torch.stack([whole(member)[:, shared].log_softmax(-1) for member in mixture.members])
    log_w = mixture.log_weights.T[:, :, None]
    if mixture.confidence is not None:
        entropy = -(log_p.exp() * log_p).sum(-1, keepdim=True)
        log_w = (log_w - entropy / mixture.confidence).log_softmax(0)
    if mixture.space == "probability":
        return (log_w.exp() * log_p.exp()).sum(0).log()
    return (log_w.exp() * log_p).sum(0).log_softmax(-1)


@pytest.mark.parametrize("confidence", [None, 0.7])
@pytest.mark.parametrize("space", SPACES)
def test_every_divergence_from_a_mixture_is_that_from_its_explicit_average(
    divergence, models, mixture, space, confidence
):
    student, _ = models(bias=True)
    teacher = mixture(space=space, confidence=confidence)
    ours = chunked(divergence, student, teacher, chunk_rows=7)
    assert_same(ours, divergence(logits(student), average(teacher)), student)
    torch.testing.assert_close(ours, chunked(divergence, student, Dense(average(teacher))))


@pytest.mark.parametrize("space", SPACES)
def test_finite_differences_agree_with_the_gradient_towards_a_mixture(differentiable, draw, mixture, space):
    teacher = mixture(rows=3, vocab=5, space=space, confidence=1.3)
    inputs = draw(3, 2).requires_grad_(), draw(5, 2).requires_grad_()

    def rows(hidden, weight):
        return chunked(differentiable, Hidden(hidden, Head(weight)), teacher, chunk_rows=2)

    assert torch.autograd.gradcheck(lambda *x: rows(*x).sum(), inputs)
    assert torch.autograd.gradcheck(rows, inputs)


@pytest.mark.parametrize("space", SPACES)
def test_the_sizes_of_chunks_and_blocks_are_inert(models, mixture, space, monkeypatch):
    student, _ = models()
    teacher = mixture(space=space)
    expected = reverse_kl(logits(student), average(teacher))
    for chunk_rows in (1, 40, 41, None):
        assert_same(chunked(reverse_kl, student, teacher, chunk_rows=chunk_rows), expected, student)
    monkeypatch.setitem(BLOCK, "cpu", 3 * VOCAB)
    assert_same(chunked(reverse_kl, student, teacher, chunk_rows=8), expected, student)


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("vocab", [VOCAB - 40, torch.arange(3, VOCAB - 40, 2)], ids=["first", "list"])
def test_members_are_cut_to_the_shared_ids_before_their_softmax(models, mixture, space, vocab):
    student, _ = models(vocab=VOCAB + 11)
    teacher = mixture(space=space, confidence=2.0, sizes=[VOCAB, VOCAB + 64, VOCAB + 3])
    shared = slice(vocab) if isinstance(vocab, int) else vocab
    expected = forward_kl(logits(student)[:, shared], average(teacher, vocab))
    assert_same(chunked(forward_kl, student, teacher, vocab=vocab, chunk_rows=7), expected, student)


def test_members_of_different_sizes_need_the_shared_ids(models, mixture):
    student, _ = models()
    with pytest.raises(ValueError, match=f"scores {VOCAB} ids and the teacher {VOCAB + 8}: pass vocab="):
        chunked(forward_kl, student, mixture(sizes=[VOCAB, VOCAB + 8, VOCAB]))
    with pytest.raises(ValueError, match=f"vocab={VOCAB}, but the teacher scores {VOCAB - 1} ids"):
        chunked(forward_kl, student, mixture(sizes=[VOCAB, VOCAB - 1, VOCAB]), vocab=VOCAB)


def test_losses_and_measures_come_in_one_pass(models, mixture):
    student, _ = models()
    teacher, labels = mixture(), torch.arange(ROWS)
    terms = [
        ("forward_kl", ForwardKL(temperature=2.0), 1.0),
        ("reverse_kl", ReverseKL(), 0.5),
        ("ce", CrossEntropy(), 0.1),
    ]
    measures = measures_for(Mixture)
    assert measures == measures_for(Dense)
    ours, parts = weighted_sum(terms, student, teacher, labels, measures=measures)
    dense, expected = weighted_sum(terms, student, Dense(average(teacher)), labels, measures=measures)
    assert_same(ours, dense, student)
    assert parts.keys() == expected.keys()
    for name, values in parts.items():
        torch.testing.assert_close(values, expected[name])


def test_no_rows_give_no_values_and_gradients_of_zero(models, mixture):
    student, _ = models(rows=0)
    ours = chunked(forward_kl, student, mixture(rows=0))
    ours.sum().backward()
    assert ours.shape == (0,) and all(not leaf.grad.any() for leaf in leaves(student))


def test_a_kernel_is_not_promised_for_a_mixture(models, mixture):
    student, _ = models()
    with pytest.raises(ValueError, match=r"impl='triton': (a mixture of teachers has no kernel|there are no kernels)"):
        chunked(forward_kl, student, mixture(), impl="triton")


def test_half_precision_members_are_mixed_in_float32(models, mixture):
    student, _ = models(dtype=torch.float32)
    teacher = mixture(dtype=torch.bfloat16)
    wide = Mixture(
        tuple(
            Hidden(
                m.hidden.float(), Head(m.head.weight.float(), m.head.bias.float(), m.head.logit_scale, m.head.softcap)
            )
            if isinstance(m, Hidden)
            else Dense(m.logits.float())
            for m in teacher.members
        ),
        teacher.log_weights.float(),
    )
    ours = chunked(forward_kl, student, teacher, chunk_rows=7)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, chunked(forward_kl, student, wide, chunk_rows=7))


@pytest.mark.parametrize("space", SPACES)
def test_no_tensor_over_all_rows_and_the_vocabulary_is_made(divergence, models, draw, space):
    chunked(forward_kl, *models(rows=2))  # what is allocated once in a process
    student, first = models(rows=200)
    members = (first, *(Hidden(draw(200, width), Head(draw(VOCAB, width))) for width in (3, 7)))
    teacher = Mixture(members, draw(200, 3).log_softmax(1), space)
    given = [*leaves(student), *(x for m in members for x in (m.hidden, m.head.weight)), teacher.log_weights]
    with Allocations(*given) as seen:
        chunked(divergence, student, teacher, chunk_rows=10).sum().backward()
    assert max(seen.sizes) == 10 * VOCAB


def test_a_mixture_leaves_no_graph_to_its_members(models, draw):
    student, _ = models()
    hidden, weight = draw(ROWS, 3).requires_grad_(), draw(VOCAB, 3).requires_grad_()
    teacher = Mixture(
        (Hidden(hidden, Head(weight)), Dense(draw(ROWS, VOCAB).requires_grad_())), torch.zeros(ROWS, 2) - 0.6931
    )
    chunked(forward_kl, student, teacher).sum().backward()
    assert hidden.grad is None and weight.grad is None and teacher.members[1].logits.grad is None
