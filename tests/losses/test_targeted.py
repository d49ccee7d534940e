"""Losses that set the label's class apart: the parts they are made of, rows without a label, and what they teach."""

from functools import partial

import pytest
import torch
from linear_pair import VOCAB, Allocations, assert_same, leaves, logits
from torch.autograd import gradcheck

from kdlm.losses import (
    DKD,
    IGNORE_INDEX,
    NKD,
    OFA,
    CrossEntropy,
    chunked,
    cross_entropy,
    decoupled_kl,
    forward_kl,
    label_places,
    normalised_kd,
    ofa,
    weighted_sum,
)
from kdlm.signal import Dense, Head, Hidden, Mixture

LOSSES = {
    "dkd": decoupled_kl,
    "dkd_of_images": partial(decoupled_kl, beta=8.0, temperature=4.0),
    "nkd": normalised_kd,
    "nkd_of_images": partial(normalised_kd, gamma=3.5, temperature=3.0),
    "ofa": ofa,
    "ofa_cubed": partial(ofa, eps=3.0, temperature=2.0),
}


@pytest.fixture(params=list(LOSSES))
def loss(request):
    return LOSSES[request.param]


@pytest.fixture
def pick():
    """Return a function that draws labels, the same in every run."""
    generator = torch.Generator().manual_seed(0)
    return lambda rows, vocab: torch.randint(vocab, (rows,), generator=generator)


def gradient(value, student):
    return torch.autograd.grad(value.sum(), student)[0]


def by_the_book(name, student, teacher, labels):
    """One row at a time on probabilities, the other classes gathered, as the papers have it."""
    values = []
    for z, w, y in zip(student, teacher, labels.tolist(), strict=True):
        others = [v for v in range(len(z)) if v != y]

        def split(x, t, y=y, others=others):
            whole = (x / t).exp() / (x / t).exp().sum()
            return whole[y], whole[others].sum(), whole[others] / whole[others].sum()

        if name.startswith("dkd"):
            beta, t = (8.0, 4.0) if "images" in name else (0.5, 1.0)
            (q_y, q_rest, q_others), (p_y, p_rest, p_others) = split(z, t), split(w, t)
            tckd = p_y * (p_y / q_y).log() + p_rest * (p_rest / q_rest).log()
            nckd = (p_others * (p_others / q_others).log()).sum()
            values.append(t**2 * (tckd + beta * nckd))
        elif name.startswith("nkd"):
            gamma, t = (3.5, 3.0) if "images" in name else (1.5, 1.0)
            (q_y, _, _), (p_y, _, _) = split(z, 1.0), split(w, 1.0)
            (_, _, q_others), (_, _, p_others) = split(z, t), split(w, t)
            values.append(-p_y * q_y.log() - gamma * t**2 * (p_others * q_others.log()).sum())
        else:
            eps, t = (3.0, 2.0) if "cubed" in name else (1.5, 1.0)
            q, p = (z / t).softmax(-1), (w / t).softmax(-1)
            onehot = torch.eye(len(z), dtype=z.dtype)[y]
            values.append(-(t**2) * (((p + onehot) ** eps - onehot) * q.log()).sum())
    return torch.stack(values)


@pytest.mark.parametrize("name", list(LOSSES))
def test_values_and_gradients_are_those_of_the_papers_formulas(name, draw, pick):
    student, teacher, labels = (2 * draw(20, 11)).requires_grad_(), 2 * draw(20, 11), pick(20, 11)
    ours, expected = LOSSES[name](student, teacher, labels), by_the_book(name, student, teacher, labels)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(gradient(ours, student), gradient(expected, student))


def test_finite_differences_agree_with_the_gradient(loss, draw, pick):
    teacher, labels = draw(4, 7), pick(4, 7)
    assert gradcheck(lambda z: loss(z, teacher, labels), draw(4, 7).requires_grad_())


def test_forward_kl_is_its_two_parts_weighed_by_what_the_teacher_leaves(draw, pick):
    student, teacher, labels = draw(50, 17), 3 * draw(50, 17), pick(50, 17)
    for t in (0.5, 1.0, 4.0):
        part = partial(decoupled_kl, student, teacher, labels, temperature=t)
        rest = 1 - (teacher / t).softmax(-1).gather(-1, labels[:, None]).squeeze(-1)
        whole = part(alpha=1.0, beta=0.0) + rest * part(alpha=0.0, beta=1.0)
        torch.testing.assert_close(whole, forward_kl(student, teacher, temperature=t), rtol=1e-9, atol=1e-12)


def test_the_part_of_the_label_is_deaf_to_the_others_and_theirs_to_the_label(draw, pick):
    student, teacher, labels = draw(9, 17), draw(9, 17), pick(9, 17)
    at_label = torch.nn.functional.one_hot(labels, 17).double()
    of_label = partial(decoupled_kl, labels=labels, alpha=1.0, beta=0.0)
    of_others = partial(decoupled_kl, labels=labels, alpha=0.0, beta=1.0)
    raised = student + draw(9, 1) * at_label
    torch.testing.assert_close(of_others(raised, teacher), of_others(student, teacher))
    others = [[v for v in range(17) if v != y] for y in labels.tolist()]
    shuffled = teacher.clone()
    for row, places in enumerate(others):
        shuffled[row, places] = teacher[row, places[::-1]]
    torch.testing.assert_close(of_label(student, shuffled), of_label(student, teacher))


def test_nkd_at_temperature_one_is_the_two_parts_of_forward_kl_with_their_entropies(draw, pick):
    student, teacher, labels = draw(30, 17), 2 * draw(30, 17), pick(30, 17)
    p_y = teacher.softmax(-1).gather(-1, labels[:, None]).squeeze(-1)
    q_y = student.softmax(-1).gather(-1, labels[:, None]).squeeze(-1)
    entropy_of_others = normalised_kd(teacher, teacher, labels, gamma=1.0) + p_y * p_y.log()
    of_others = normalised_kd(student, teacher, labels, gamma=1.0) + p_y * q_y.log() - entropy_of_others
    torch.testing.assert_close(of_others, decoupled_kl(student, teacher, labels, alpha=0.0, beta=1.0))
    binary = p_y * (p_y / q_y).log() + (1 - p_y) * ((1 - p_y) / (1 - q_y)).log()
    torch.testing.assert_close(binary + (1 - p_y) * of_others, forward_kl(student, teacher))


def test_the_gradient_of_nkd_leaves_the_others_alone_where_they_agree(draw, pick):
    teacher, labels = draw(9, 17), pick(9, 17)
    student = teacher.clone().requires_grad_()
    alone = normalised_kd(student, teacher, labels, gamma=0.0)
    both = normalised_kd(student, teacher, labels, gamma=1.5, temperature=3.0)
    found, expected = gradient(both, student), gradient(alone, student)
    torch.testing.assert_close(found, expected)
    assert (found.gather(-1, labels[:, None]) < 0).all()  # upwards, also from equality


def test_ofa_at_one_is_cross_entropy_under_the_teacher_whatever_the_label(draw, pick):
    student, teacher = draw(9, 17), draw(9, 17)
    expected = -(teacher.softmax(-1) * student.log_softmax(-1)).sum(-1)
    for _ in range(3):
        torch.testing.assert_close(ofa(student, teacher, pick(9, 17), eps=1.0), expected)


@pytest.mark.parametrize("eps", [1.0, 1.2, 1.5, 2.0, 4.0])
def test_ofa_weighs_the_label_more_and_the_others_less_and_nothing_below_zero(draw, pick, eps):
    teacher, labels = 3 * draw(50, 17), pick(50, 17)
    # Its value is linear in log q, so each class's weight is a difference of two values.
    base = torch.zeros(50, 17, dtype=torch.float64).requires_grad_()
    total = gradient(ofa(base, teacher, labels, eps=eps), base)
    sums = ofa(base, teacher, labels, eps=eps) / torch.tensor(17.0).double().log()
    weights = sums[:, None] * base.softmax(-1) - total
    p = teacher.softmax(-1)
    at_label = torch.nn.functional.one_hot(labels, 17).bool()
    assert weights.isfinite().all() and (weights > -1e-12).all()
    assert (weights[at_label] >= p[at_label] - 1e-12).all()
    assert (weights[~at_label] <= p[~at_label] + 1e-12).all()


def test_ofa_below_one_is_refused(draw, pick):
    with pytest.raises(ValueError, match="at least 1"):
        ofa(draw(2, 7), draw(2, 7), pick(2, 7), eps=0.9)


def test_a_row_without_a_label_takes_the_teachers_likeliest_class(loss, draw, pick):
    student, teacher, labels = draw(9, 17).requires_grad_(), draw(9, 17), pick(9, 17)
    some = torch.where(torch.arange(9) % 2 == 0, labels, IGNORE_INDEX)
    filled = torch.where(some == IGNORE_INDEX, teacher.argmax(-1), some)
    torch.testing.assert_close(loss(student, teacher, some), loss(student, teacher, filled))
    torch.testing.assert_close(loss(student, teacher), loss(student, teacher, teacher.argmax(-1)))


def test_rows_without_a_label_give_cross_entropy_nothing(draw, pick):
    student, labels = draw(9, 17).requires_grad_(), pick(9, 17)
    labels[::2] = IGNORE_INDEX
    terms = [("cross_entropy", CrossEntropy(), 1.0)]
    for total in (cross_entropy(student, labels), weighted_sum(terms, Dense(student), None, labels)[0]):
        found = gradient(total, student)
        assert (total[::2] == 0).all() and (found[::2] == 0).all()
        assert (total[1::2] > 0).all() and (found[1::2] != 0).all()


def test_constants_the_order_of_classes_and_leading_dimensions_are_inert(loss, draw, pick):
    student, teacher, labels = draw(6, 17), draw(6, 17), pick(6, 17)
    value = loss(student, teacher, labels)
    torch.testing.assert_close(loss(student + draw(6, 1), teacher + draw(6, 1), labels), value)
    order = torch.randperm(17, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(loss(student[:, order], teacher[:, order], order.argsort()[labels]), value)
    shaped = loss(student.view(2, 3, 17), teacher.view(2, 3, 17), labels.view(2, 3))
    torch.testing.assert_close(shaped.flatten(), value)
    assert loss(student[:0], teacher[:0], labels[:0]).shape == (0,)


def test_the_teacher_carries_no_gradient(loss, draw, pick):
    student, teacher = draw(5, 17).requires_grad_(), draw(5, 17).requires_grad_()
    loss(student, teacher, pick(5, 17)).sum().backward()
    assert student.grad is not None and teacher.grad is None


def test_half_precision_logits_are_widened_before_anything_else(loss, draw, pick):
    student, teacher, labels = draw(5, 1271, dtype=torch.bfloat16), draw(5, 1271, dtype=torch.bfloat16), pick(5, 1271)
    value = loss(student, teacher, labels)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, loss(student.float(), teacher.float(), labels))


@pytest.mark.parametrize("scale", [1e2, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_logits_give_finite_values_and_gradients(loss, draw, pick, dtype, scale):
    labels = pick(20, 41)
    sure = torch.nn.functional.one_hot(labels, 41).mul(2 * scale).sub(scale).to(dtype)
    spread, signs = draw(20, 41).mul(scale).to(dtype), draw(20, 41).sign().mul(scale).to(dtype)
    for student, teacher in [(spread, signs), (sure, spread), (spread, sure), (sure, sure), (-sure, sure)]:
        leaf = student.clone().requires_grad_()
        value = loss(leaf, teacher, labels)
        assert value.isfinite().all() and gradient(value, leaf).isfinite().all()


def test_what_is_left_of_a_sure_teacher_is_exact_and_not_rounded_away(draw):
    # In fp32 1 - p rounds to 0 from a margin of 17 on; the shares of the others do not depend on it.
    student, teacher, labels = draw(5, 17), draw(5, 17), torch.zeros(5, dtype=torch.long)
    modest = decoupled_kl(student, teacher, labels, alpha=0.0, beta=1.0)
    for margin in (20.0, 200.0):
        lift = torch.zeros(17).index_fill(0, torch.tensor(0), margin)
        sure = decoupled_kl(student.float() + lift, teacher.float() + lift, labels, alpha=0.0, beta=1.0)
        torch.testing.assert_close(sure.double(), modest, rtol=1e-4, atol=1e-5)
    doubtful, certain = torch.tensor([[0.0, 0.0]]), torch.tensor([[50.0, 0.0]])
    value = decoupled_kl(certain, doubtful, labels[:1], beta=0.0)
    exact = decoupled_kl(certain.double(), doubtful.double(), labels[:1], beta=0.0)
    torch.testing.assert_close(value.double(), exact, rtol=1e-6, atol=0)
    assert exact.item() == pytest.approx(25 - 2 * 0.6931472 / 2, rel=1e-6)  # (50 + 0) / 2 - log 2


@pytest.mark.usefixtures("unchecked_types")
def test_different_vocabularies_and_a_temperature_of_zero_are_refused(loss, draw, pick):
    with pytest.raises(ValueError, match="share"):
        loss(draw(5, 41), draw(5, 43), pick(5, 41))
    function = loss.func if isinstance(loss, partial) else loss
    with pytest.raises(ValueError, match="temperature"):
        function(draw(5, 41), draw(5, 41), pick(5, 41), temperature=0.0)


@pytest.mark.parametrize("section", [DKD(beta=2.0), NKD(temperature=2.0), OFA()], ids=lambda section: section.name)
def test_the_chunked_form_is_the_plain_one_without_whole_logits(models, pick, section):
    student, teacher = models(bias=True)
    labels = pick(len(student.hidden), VOCAB)
    labels[::5] = IGNORE_INDEX
    expected = section(logits(student), logits(teacher), labels)
    ours, parts = weighted_sum([("it", section, 0.5)], student, teacher, labels, chunk_rows=7)
    assert_same(2 * ours, expected, student)
    torch.testing.assert_close(parts["it"], expected.detach())
    function = partial(type(section).divergence, **section.options())
    assert_same(chunked(function, student, teacher, labels, chunk_rows=7), expected, student)
    with Allocations(*leaves(student), teacher.head.weight) as seen:
        weighted_sum([("it", section, 1.0)], student, teacher, labels, chunk_rows=7)[0].sum().backward()
    assert max(seen.sizes) == 7 * VOCAB


def test_hidden_states_logits_and_a_mixture_of_one_teacher_say_the_same(loss, models, pick):
    student, teacher = models()
    labels = pick(len(student.hidden), VOCAB)
    mixture = Mixture((teacher, teacher), torch.full((len(labels), 2), 0.5).double().log())
    expected = loss(logits(student), logits(teacher), labels)
    for signal in (teacher, Dense(logits(teacher)), mixture):
        assert_same(chunked(loss, student, signal, labels, chunk_rows=7), expected, student)


@pytest.mark.parametrize("vocab", [1200, torch.arange(3, VOCAB, 2)], ids=["first", "list"])
@pytest.mark.parametrize("section", [DKD(), NKD(), OFA()], ids=lambda section: section.name)
def test_labels_count_the_shared_ids_and_one_that_is_not_shared_is_none(models, pick, section, vocab):
    student, teacher = models(teacher_vocab=1300)
    labels = pick(len(student.hidden), VOCAB)
    labels[:4] = torch.tensor([0, 1270, IGNORE_INDEX, 1199])
    shared = torch.arange(vocab) if isinstance(vocab, int) else vocab
    places = {token: place for place, token in enumerate(shared.tolist())}
    numbered = torch.tensor([places.get(token, IGNORE_INDEX) for token in labels.tolist()])
    assert torch.equal(label_places(labels, vocab), numbered) and (numbered == IGNORE_INDEX).any()
    expected = section(logits(student)[:, shared], logits(teacher)[:, shared], numbered)
    measures = ["cross_entropy", "teacher_cross_entropy"]
    ours, parts = weighted_sum([("it", section, 1.0)], student, teacher, labels, vocab=vocab, measures=measures)
    assert_same(ours, expected, student)
    torch.testing.assert_close(parts["cross_entropy"], cross_entropy(logits(student), labels).detach())
    assert torch.equal(parts["teacher_cross_entropy"].isinf(), numbered == IGNORE_INDEX)


@pytest.mark.parametrize("section", [DKD(), NKD(), OFA()], ids=lambda section: section.name)
def test_a_student_learns_from_rows_without_labels_what_few_labels_do_not_tell(draw, section):
    """Rows of logits of a classifier: 40 with a label, 400 without; judged by agreement with the teacher on others."""
    hidden, head = draw(32, 8), draw(10, 32)

    def teach(x):
        return 3 * torch.tanh(x @ hidden.T) @ head.T / 32**0.5

    inputs, held_out = draw(440, 8), draw(500, 8)
    labels = teach(inputs).argmax(-1)
    labels[40:] = IGNORE_INDEX

    def agreement(terms):
        first = torch.nn.Parameter(draw(24, 8) / 8**0.5)
        second = torch.nn.Parameter(draw(10, 24) / 24**0.5)
        optimiser = torch.optim.Adam([first, second], lr=0.02)
        for _ in range(150):
            optimiser.zero_grad()
            student = Hidden(torch.tanh(inputs @ first.T), Head(second))
            weighted_sum(terms, student, Dense(teach(inputs)), labels)[0].sum().div(440).backward()
            optimiser.step()
        found = torch.tanh(held_out @ first.T) @ second.T
        return (found.argmax(-1) == teach(held_out).argmax(-1)).double().mean().item()

    by_labels = agreement([("cross_entropy", CrossEntropy(), 11.0)])  # mean over the labelled rows
    with_teacher = agreement([("cross_entropy", CrossEntropy(), 1.0), ("it", section, 1.0)])
    assert with_teacher > by_labels + 0.15
