"""Tokens that a model rules out, with logits of -inf: every loss is the limit of what large negative logits give.

Either it is finite, in value and gradient, or it is inf because the divergence is.
"""

from functools import partial
from typing import get_args

import pytest
import torch
from kdlm_kernels import linear_logprobs

from kdlm.losses import (
    CAKLD,
    DKD,
    JSD,
    NKD,
    OFA,
    TVD,
    AdaptiveKL,
    AlphaMixture,
    AnyLoss,
    CustomLoss,
    ForwardKL,
    ReverseKL,
    Selective,
    SkewKL,
    SkewReverseKL,
    TopKLD,
    TowardsTeacher,
    TVDPlusPlus,
    cross_entropy,
    gated_jsd,
    label_places,
    measures_for,
    plackett_luce,
    sampled_cross_entropy,
    weighted_sum,
)
from kdlm.signal import Dense, Draws, Mixture, Sampled, TopK

ROWS, VOCAB = 4, 11
RULED_OUT = torch.tensor([0, 3, 8])
LEFT = torch.tensor([1, 2, 4, 5, 6, 7, 9, 10])
LABELS = torch.tensor([1, 2, 10, 5])
FAR = 700.0
"""Nats below all others: the exponential of its negative is still a float64."""
TEACHER, STUDENT = "where the teacher rules out", "where the student rules out"


def towards(t):
    return TowardsTeacher(torch.tensor(t, dtype=torch.float64))


LOSSES = {
    "forward_kl": (ForwardKL(), {STUDENT}),
    "reverse_kl": (ReverseKL(), {TEACHER}),
    "skew_kl": (SkewKL(), {}),
    "skew_kl_0": (SkewKL(skew=0), {STUDENT}),
    "skew_reverse_kl": (SkewReverseKL(), {}),
    "skew_reverse_kl_0": (SkewReverseKL(skew=0), {TEACHER}),
    "jsd": (JSD(beta=0.3), {}),
    "jsd_normalised": (JSD(beta=0.1, normalised=True), {}),
    "jsd_0": (JSD(beta=0), {STUDENT}),
    "jsd_1": (JSD(beta=1), {TEACHER}),
    "tvd": (TVD(), {}),
    "tvd_plus_plus": (TVDPlusPlus(), {}),
    "adaptive_kl": (AdaptiveKL(), {STUDENT, TEACHER}),
    "alpha_mixture": (AlphaMixture(share=0.3), {}),
    "alpha_arithmetic": (AlphaMixture(alpha=-1, share=0.3), {}),
    "alpha_geometric": (AlphaMixture(alpha=1, share=0.3), {STUDENT}),
    "alpha_harmonic": (AlphaMixture(alpha=3, share=0.3), {STUDENT}),
    "topkld_0": (TopKLD(k=0), {TEACHER}),
    "topkld": (TopKLD(k=10), {STUDENT}),  # a smaller k is infinite where the token is of that part
    "cakld": (CAKLD(), {STUDENT, TEACHER}),
    "dkd": (DKD(beta=2), {STUDENT}),
    "nkd": (NKD(), {STUDENT}),
    "ofa": (OFA(), {STUDENT}),
    "taid_0": (towards(0.0), {}),
    "taid": (towards(0.4), {}),  # its target has the student in it
    "taid_1": (towards(1.0), {STUDENT}),
}
"""Each loss with a teacher, and its limits: where it is infinite, as its divergence is."""
HOT = {name: loss.model_copy(update={"temperature": 2.0}) for name, (loss, _) in LOSSES.items() if "taid" not in name}


@pytest.fixture(params=list(LOSSES))
def named(request):
    return request.param


@pytest.fixture
def pair(draw):
    return draw(ROWS, VOCAB), draw(ROWS, VOCAB)


def ruled_out(z, far=torch.inf):
    return z.index_fill(-1, RULED_OUT, -far)


def run(loss, student, teacher, labels=LABELS):
    """The values of a loss, and its gradient to the student's logits."""
    student = student.detach().clone().requires_grad_()
    rows = loss(student, teacher, labels)
    return rows.detach(), torch.autograd.grad(rows.sum(), student)[0]


def summed(loss, student, teacher, labels):
    """As training sums losses up: by the kernels, where they know the loss."""
    teacher = Dense(teacher) if isinstance(teacher, torch.Tensor) else teacher
    return weighted_sum([("it", loss, 1.0)], Dense(student), teacher, labels)[0]


@pytest.fixture(params=["eager", "summed"])
def way(request):
    """Return a loss itself, or what makes its sum."""
    return (lambda loss: loss) if request.param == "eager" else (lambda loss: partial(summed, loss))


def assert_same(found, expected, **tolerance):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


def test_every_loss_with_a_teacher_is_held_to_these_laws():
    union = get_args(get_args(AnyLoss)[0])
    assert {type(loss) for loss, _ in LOSSES.values()} >= {loss for loss in union if loss.needs_teacher} - {CustomLoss}


def test_what_both_rule_out_is_as_if_it_were_not_there(named, pair, way):
    student, teacher = pair
    for loss in (LOSSES[named][0], HOT.get(named)):
        if loss is None:
            continue
        value, gradient = run(way(loss), ruled_out(student), ruled_out(teacher))
        expected = run(loss, student[:, LEFT], teacher[:, LEFT], label_places(LABELS, LEFT))
        assert_same((value, gradient[:, LEFT]), expected)
        assert not gradient[:, RULED_OUT].any()


@pytest.mark.parametrize("side", [TEACHER, STUDENT])
def test_what_one_rules_out_is_the_limit_of_what_it_finds_unlikely(named, pair, side, way):
    student, teacher = pair

    def logits(far):
        return (student, ruled_out(teacher, far)) if side == TEACHER else (ruled_out(student, far), teacher)

    cold, infinite = LOSSES[named]
    for loss in (cold, HOT.get(named)):
        if loss is None:
            continue
        value, gradient = run(way(loss), *logits(torch.inf))
        if side not in infinite:
            assert_same((value, gradient), run(loss, *logits(FAR)))
            continue
        assert value.isposinf().all()
        if side == STUDENT:  # what training would do, if it could get there
            torch.testing.assert_close(gradient, run(loss, *logits(FAR))[1])


def test_forward_kl_is_the_sum_over_what_the_teacher_allows(pair):
    student, teacher = pair
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        z, y = student.to(dtype), ruled_out(teacher.to(dtype))
        for loss in (ForwardKL(), partial(summed, ForwardKL())):
            value, gradient = run(loss, z, y)
            log_q, log_p = z.double().log_softmax(-1), y.double().log_softmax(-1)
            expected = (log_p.exp() * (log_p - log_q))[:, LEFT].sum(-1)
            exact = dtype == torch.float64
            tolerance = {} if exact else {"rtol": 1e-5, "atol": 1e-6}
            torch.testing.assert_close(value.double(), expected, **tolerance)
            rough = {"rtol": 1e-2, "atol": 1e-3} if dtype == torch.bfloat16 else tolerance
            torch.testing.assert_close(gradient.double(), log_q.exp() - log_p.exp(), **rough)


def test_probabilities_that_underflow_are_as_good_as_none(named, pair, way):
    loss, infinite = LOSSES[named]
    student, teacher = (x.float() for x in pair)
    for far in (120.0, 1e4):  # exp(-120) is 0 in float32
        value, gradient = run(way(loss), student, ruled_out(teacher, far))
        assert value.isfinite().all() and gradient.isfinite().all()
        if TEACHER not in infinite:
            assert_same((value, gradient), run(loss, student, ruled_out(teacher)), rtol=1e-4, atol=1e-5)


def test_a_logit_that_is_not_a_number_is_not_hidden(named, pair):
    student, teacher = pair
    loss = LOSSES[named][0]
    poisoned = ruled_out(teacher).index_fill(-1, torch.tensor([2]), torch.nan)
    for function in (loss, partial(summed, loss)):
        if named != "taid_0":  # looks at the student alone
            assert run(function, student, poisoned)[0].isnan().all()
        assert run(function, poisoned, ruled_out(teacher))[0].isnan().all()


def test_a_single_possible_token_is_certain_on_both_sides(named):
    certain = torch.full((1, VOCAB), -torch.inf, dtype=torch.float64)
    certain[:, 1] = 0.3
    loss = LOSSES[named][0]
    for function in (loss, partial(summed, loss)):
        value, gradient = run(function, certain, certain, torch.tensor([1]))
        assert value.abs().max() < 1e-15 and gradient.abs().max() < 1e-15


def test_a_sum_of_terms_over_shared_ids_is_finite_where_each_is(pair):
    student, teacher = pair
    wide = torch.cat([student, student[:, :2]], -1)  # two ids that the teacher lacks
    labels = torch.tensor([1, 12, 10, 5])
    terms = [("forward_kl", ForwardKL(), 0.7), ("jsd", JSD(), 0.3), ("reverse_kl", ReverseKL(), 0.0)]

    def total(z, y, labels):
        return weighted_sum(terms, Dense(z), Dense(y), labels, vocab=VOCAB)[0]

    ours = run(total, wide, ruled_out(teacher), labels)

    def by_hand(z, y, _):
        return 0.7 * ForwardKL()(z[:, :VOCAB], y) + 0.3 * JSD()(z[:, :VOCAB], y)

    assert_same(ours, run(by_hand, wide, ruled_out(teacher)))
    parts = weighted_sum(terms, Dense(wide), Dense(ruled_out(teacher)), labels, vocab=VOCAB)[1]
    assert parts["reverse_kl"].isposinf().all()


def test_the_kernels_measure_what_the_eager_pass_measures(pair):
    student, teacher = pair
    for z, y in ((student, ruled_out(teacher)), (ruled_out(student), ruled_out(teacher))):
        names = measures_for(Dense)
        one = weighted_sum([], Dense(z), Dense(y), LABELS, measures=names)[1]
        other = weighted_sum([], Dense(z), Dense(y), LABELS, measures=(*names, "brier"))[1]  # which no kernel takes
        for name in names:
            torch.testing.assert_close(one[name], other[name])
            assert one[name].isfinite().all()


@pytest.mark.parametrize("confidence", [None, 0.7])
@pytest.mark.parametrize("space", ["probability", "log"])
def test_a_mixture_has_a_member_that_rules_tokens_out(pair, draw, space, confidence):
    student, teacher = pair
    weights = torch.tensor([[0.3, 0.7], [1.0, 0.0], [0.0, 1.0], [0.7, 0.3]], dtype=torch.float64).log()

    def value(far):
        first, second = Dense(ruled_out(teacher, far)), Dense(teacher.flip(0))
        for members, log_weights in (((first, second), weights), ((second, first), weights.flip(1))):
            mixture = Mixture(members, log_weights, space, confidence)
            yield run(partial(summed, ForwardKL()), student, mixture)

    (one, turned), (near, _) = value(torch.inf), value(FAR)
    assert_same(one, near)
    assert_same(turned, near)


@pytest.mark.parametrize("named", [name for name in LOSSES if TopK in LOSSES[name][0].signals])
def test_a_few_tokens_of_which_some_are_ruled_out_are_no_different(named, pair):
    student, teacher = pair
    loss = LOSSES[named][0]

    def top_k(far):
        log_p, ids = ruled_out(teacher, far).log_softmax(-1).topk(9)  # one of them is ruled out
        return TopK(ids, log_p)

    for z, of_limit in ((student, student), (ruled_out(student), ruled_out(student, FAR))):
        for function in (loss, partial(summed, loss)):
            found = run(function, z, top_k(torch.inf))
            if named not in ("reverse_kl", "skew_reverse_kl_0", "jsd_1", "adaptive_kl") or z is not student:
                assert_same(found, run(loss, of_limit, top_k(FAR)), rtol=1e-5, atol=1e-6)
            assert found[0].isfinite().all() and found[1].isfinite().all()


def test_draws_and_labels_that_count_for_nothing_may_be_ruled_out(pair):
    student = ruled_out(pair[0])
    ids, counts = torch.tensor([[1, 0, 2]] * ROWS), torch.tensor([[2.0, 0.0, 1.0]] * ROWS, dtype=torch.float64)
    labels = torch.tensor([1, -100, 10, -100])
    expected = run(lambda z, *_: -(2 * z.log_softmax(-1)[:, 1] + z.log_softmax(-1)[:, 2]) / 3, student, None)
    assert_same(run(lambda z, *_: sampled_cross_entropy(z, Sampled(ids, counts)), student, None), expected)
    assert_same(run(partial(summed, ForwardKL()), student, Sampled(ids, counts), labels), expected)
    found = weighted_sum([], Dense(student), Sampled(ids, counts), labels, measures=["cross_entropy"])[1]
    torch.testing.assert_close(found["cross_entropy"], cross_entropy(student, labels))
    assert found["cross_entropy"].isfinite().all()
    log_p = torch.tensor([[0.5, 0.0, 0.3]] * ROWS, dtype=torch.float64).log()
    drawn = TopK(ids, log_p, Draws(ids[:, 1:] + 3, log_p[:, 1:], counts[:, 1:]))
    assert run(ForwardKL(), student, drawn)[0].isfinite().all()


def test_log_probabilities_and_entropy_leave_out_what_is_ruled_out(pair):
    def of_kernel(z, *_):
        log_probs, entropy = linear_logprobs(z, None, LABELS[:, None], temperature=1.3)
        return log_probs[:, 0] + 2 * entropy

    def by_the_book(z, *_):
        logs = (z[:, LEFT] / 1.3).log_softmax(-1)
        place = label_places(LABELS, LEFT)
        return logs.gather(1, place[:, None])[:, 0] - 2 * (logs.exp() * logs).sum(-1)

    assert_same(run(of_kernel, ruled_out(pair[0]), None), run(by_the_book, ruled_out(pair[0]), None))


def test_the_terms_of_tsd_kd_are_those_over_what_both_allow(pair):
    student, teacher = pair
    ones = torch.ones(ROWS, dtype=torch.float64)

    def terms(z, y, _):
        return Selective(k=10)(z, y, ones, ones, ones)[0]

    value, gradient = run(terms, ruled_out(student), ruled_out(teacher))
    assert_same((value, gradient[:, LEFT]), run(terms, student[:, LEFT], teacher[:, LEFT]))
    assert_same(
        run(lambda z, y, _: gated_jsd(z, y), student, ruled_out(teacher)),
        run(lambda z, y, _: gated_jsd(z, y), student, ruled_out(teacher, FAR)),
    )
    torch.testing.assert_close(
        plackett_luce(ruled_out(student), teacher, k=10), plackett_luce(student[:, LEFT], teacher[:, LEFT], k=8)
    )
