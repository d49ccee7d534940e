"""One sweep gives what the eager losses give on whole logits, in torch and in Triton."""

import pytest
import torch
from kdlm_kernels import Head, Term, linear_divergence, triton_rows
from reference import CASES, PARTLY_DETACHED, assert_same, leaves, logits, rows

import kdlm.losses


def test_value_and_gradients_are_those_of_the_eager_form(case, impl, models):
    name, options = case
    hidden, head, theirs, teacher = models(logit_scale=0.7, softcap=5.0)
    ours = linear_divergence(
        hidden, head, theirs, teacher, divergence=name, temperature=1.7, chunk_rows=3, impl=impl, **options
    )
    expected = rows(name, logits(hidden, head), logits(theirs, teacher), temperature=1.7, **options)
    assert_same(ours, expected, leaves(hidden, head))


@pytest.mark.parametrize("case", [case for case in CASES.values() if case[0] not in PARTLY_DETACHED], ids=str)
def test_finite_differences_agree_with_the_gradient(case, impl, models):
    name, options = case
    hidden, head, theirs, teacher = models(rows=2, vocab=5)

    def values(*inputs):
        return linear_divergence(
            inputs[0], Head(*inputs[1:]), theirs, teacher, divergence=name, impl=impl, temperature=1.3, **options
        )

    inputs = (hidden, head.weight, head.bias)
    # The first backward takes what forward made, the next ones make it again: equal but for the last bits.
    tolerance = {"fast_mode": True, "nondet_tol": 1e-12}
    assert torch.autograd.gradcheck(lambda *x: values(*x).sum(), inputs, **tolerance)
    assert torch.autograd.gradcheck(values, inputs, **tolerance)  # a gradient per row is always made again


@pytest.mark.parametrize("n", [0, 1, 7])
@pytest.mark.parametrize("vocab", [1, 64, 65, 301])
def test_odd_sizes_are_no_different(impl, models, n, vocab):
    hidden, head, theirs, teacher = models(rows=n, vocab=vocab)
    ours = linear_divergence(hidden, head, theirs, teacher, divergence="generalised_jsd", impl=impl, chunk_rows=4)
    expected = kdlm.losses.generalised_jsd(logits(hidden, head), logits(theirs, teacher))
    assert_same(ours, expected, leaves(hidden, head))


def test_strides_of_the_inputs_are_inert(impl, models):
    hidden, head, theirs, teacher = models(bias=False)
    strided = hidden.detach().T.contiguous().T.requires_grad_()
    weight = torch.stack([head.weight.detach()] * 2, 1)[:, 0].requires_grad_()
    ours = linear_divergence(strided, weight, theirs.T.contiguous().T, teacher, divergence="reverse_kl", impl=impl)
    expected = kdlm.losses.reverse_kl(strided @ weight.T, logits(theirs, teacher))
    assert_same(ours, expected, [strided, weight])


def test_a_frozen_head_gets_no_gradient_and_a_frozen_body_none_either(impl, models):
    hidden, head, theirs, teacher = models(bias=False)
    frozen = linear_divergence(hidden, head.weight.detach(), theirs, teacher, impl=impl)
    whole = linear_divergence(hidden, head, theirs, teacher, impl=impl)
    (grad,) = torch.autograd.grad(frozen.sum(), [hidden])
    to_hidden, to_weight = torch.autograd.grad(whole.sum(), [hidden, head.weight])
    torch.testing.assert_close(grad, to_hidden)
    body = linear_divergence(hidden.detach(), head, theirs, teacher, impl=impl)
    torch.testing.assert_close(torch.autograd.grad(body.sum(), [head.weight])[0], to_weight)
    with torch.no_grad():
        assert not linear_divergence(hidden, head, theirs, teacher, impl=impl).requires_grad


def test_a_sum_of_terms_is_one_pass_with_every_value_beside_it(impl, models):
    hidden, head, theirs, teacher = models(teacher_vocab=310, softcap=4.0)
    labels = torch.tensor([3, 300, -100, 290, 0])
    terms = [
        Term("forward_kl", 0.7),
        Term("reverse_kl", 0.2, temperature=2.0),
        Term("forward_kl", 0.3, temperature=2.0, t_squared=False),
        Term("alpha_mixture", 0.1, options={"alpha": 3.0}),
        Term("cross_entropy", 0.5),
        Term("total_variation", 0.0),
    ]
    measures = ("student_entropy", "top1_agreement", "accuracy", "teacher_cross_entropy")
    total, parts = linear_divergence(
        hidden, head, theirs, teacher, divergence=terms, labels=labels, vocab=290, measures=measures,
        chunk_rows=2, impl=impl,
    )  # fmt: skip
    z, y = logits(hidden, head), logits(theirs, teacher)[:, :290]
    shared = z[:, :290]
    expected = {
        "forward_kl": kdlm.losses.forward_kl(shared, y),
        "reverse_kl": kdlm.losses.reverse_kl(shared, y, temperature=2.0),
        "forward_kl_1": kdlm.losses.forward_kl(shared, y, temperature=2.0, t_squared=False),
        "alpha_mixture": kdlm.losses.alpha_mixture(shared, y, alpha=3.0),
        "cross_entropy": kdlm.losses.cross_entropy(z, labels),
        "total_variation": kdlm.losses.total_variation(shared, y),
        "student_entropy": -(z.softmax(-1) * z.log_softmax(-1)).sum(-1),
        "teacher_cross_entropy": torch.where(
            (labels >= 0) & (labels < 290), -y.log_softmax(-1).gather(1, labels.clamp(0, 289)[:, None])[:, 0], torch.inf
        ),
        "top1_agreement": (shared.argmax(-1) == y.argmax(-1)).double(),
        "accuracy": (z.argmax(-1) == labels).double(),
    }
    assert list(parts) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(parts[name], value.detach())
    values = list(expected.values())
    assert_same(total, sum(t.weight * v for t, v in zip(terms, values, strict=False)), leaves(hidden, head))


def test_cross_entropy_alone_needs_no_teacher_and_projects_none(impl, models):
    hidden, head, theirs, _ = models()
    labels = torch.tensor([3, 300, -100, 290, 0])
    other = Head(torch.full((7, 9), torch.nan, dtype=theirs.dtype))  # of another size, and poisoned
    for teacher in ((None, None), (theirs, other)):
        ours = linear_divergence(hidden, head, *teacher, divergence="cross_entropy", labels=labels, impl=impl)
        assert_same(ours, kdlm.losses.cross_entropy(logits(hidden, head), labels), leaves(hidden, head))


def test_weights_multiply_value_and_gradient_and_upstream_may_differ_by_row(impl, models):
    hidden, head, theirs, teacher = models()
    weights, upstream = torch.rand(5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    ours = linear_divergence(hidden, head, theirs, teacher, divergence="skew_kl", weights=weights, impl=impl)
    expected = kdlm.losses.skew_kl(logits(hidden, head), logits(theirs, teacher)) * weights
    assert_same(ours, expected, leaves(hidden, head))
    assert_same(ours, expected, leaves(hidden, head), upstream=upstream)


def test_logits_may_take_the_place_of_hidden_states(impl, models):
    hidden, head, theirs, teacher = models()
    z, y = logits(hidden, head).detach().requires_grad_(), logits(theirs, teacher)
    kept = y.clone()
    ours = linear_divergence(z, None, y, None, divergence="reverse_kl", impl=impl, chunk_rows=2)
    assert_same(ours, kdlm.losses.reverse_kl(z, y), [z])
    assert_same(
        linear_divergence(hidden, head, y, None, impl=impl), kdlm.losses.forward_kl(logits(hidden, head), y), [hidden]
    )
    assert torch.equal(y, kept)
    with torch.no_grad():
        turned = linear_divergence(z.T.contiguous().T, None, y.T.contiguous().T, None, impl=impl)
    torch.testing.assert_close(turned, kdlm.losses.forward_kl(z, y).detach())


def test_the_t_of_taid_may_be_a_tensor(impl, models):
    hidden, head, theirs, teacher = models()
    for t in (0.0, 0.3, 1.0):
        ours = linear_divergence(hidden, head, theirs, teacher, divergence="taid_kl", t=torch.tensor(t), impl=impl)
        expected = kdlm.losses.taid_kl(logits(hidden, head), logits(theirs, teacher), t=t)
        assert_same(ours, expected, leaves(hidden, head), rtol=1e-6, atol=1e-7)


def test_extreme_logits_give_finite_values_and_gradients(case, impl, models):
    name, options = case
    hidden, head, theirs, teacher = models(dtype=torch.float32)
    far = theirs.flip(0) * -30
    with torch.no_grad():
        hidden.mul_(30)
    ours = linear_divergence(hidden, head, far, teacher, divergence=name, impl=impl, **options)
    expected = rows(name, logits(hidden, head), logits(far, teacher), **options)
    assert torch.isfinite(ours).all()
    assert_same(ours, expected, leaves(hidden, head), rtol=2e-4, atol=2e-4)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of numpy, for what the kernels leave out
@pytest.mark.parametrize("side", ["student", "teacher", "both"])
def test_tokens_that_a_model_rules_out_are_no_different(case, impl, models, side):
    name, options = case
    hidden, head, theirs, teacher = models(rows=3, vocab=150)
    # A whole block of the kernels, and more; by a bias, as a head may do it.
    out = torch.zeros(150, dtype=torch.float64).index_fill_(0, torch.arange(60, 140), -torch.inf)
    teacher = Head(teacher.weight, out if side != "student" else None)
    with torch.no_grad():
        head.bias.add_(out if side != "teacher" else 0)
    ours = linear_divergence(
        hidden, head, theirs, teacher, divergence=name, temperature=1.7, chunk_rows=2, impl=impl, **options
    )
    z, y = logits(hidden, head), logits(theirs, teacher)
    expected = rows(name, z, y, temperature=1.7, **options)
    narrow = z.detach().to(torch.bfloat16).requires_grad_()
    dense = linear_divergence(narrow, None, y.to(torch.bfloat16), None, divergence=name, impl=impl, **options)
    plain = rows(name, narrow, y.to(torch.bfloat16), **options)
    assert not ours.isnan().any()
    if side == "teacher" and expected.isposinf().all():  # of which there is no gradient
        torch.testing.assert_close(ours, expected)
        torch.testing.assert_close(dense, plain)
        return
    assert_same(ours, expected, leaves(hidden, head))
    assert_same(dense, plain, [narrow], rtol=1e-2, atol=1e-5)


def test_equal_models_are_at_distance_0_with_no_gradient(case, impl, models):
    name, options = case
    hidden, head, _, _ = models(dtype=torch.float32)
    twin = Head(head.weight.detach(), head.bias.detach())
    ours = linear_divergence(hidden, head, hidden.detach(), twin, divergence=name, impl=impl, **options)
    torch.testing.assert_close(ours, torch.zeros(5), atol=1e-5, rtol=0)
    for grad in torch.autograd.grad(ours.sum(), leaves(hidden, head)):
        assert grad.abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_error_is_at_most_that_of_torch_in_the_same_dtype_and_a_tenth(case, impl, models, dtype, monkeypatch):
    name, options = case
    monkeypatch.setattr(triton_rows, "BLOCK", 512)
    errors, sizes = torch.zeros(2, 4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    for _ in range(3 if impl == "triton" else 20):  # the interpreter is slow
        hidden, head, theirs, teacher = models(rows=12, vocab=500, dtype=dtype)
        exact = [x.detach().double().requires_grad_() for x in (hidden, head.weight, head.bias)]
        wide = Head(teacher.weight.double())

        def run(values, inputs):
            return [values, *torch.autograd.grad(values.sum(), inputs)]

        right = run(rows(name, logits(exact[0], Head(*exact[1:])), logits(theirs.double(), wide), **options), exact)
        plain = run(rows(name, logits(hidden, head), logits(theirs, teacher), **options), leaves(hidden, head))
        ours = linear_divergence(hidden, head, theirs, teacher, divergence=name, impl=impl, **options)
        for number, found in enumerate((run(ours, leaves(hidden, head)), plain)):
            errors[number] += torch.stack([(a - b).square().sum() for a, b in zip(found, right, strict=True)]).detach()
        sizes += torch.stack([truth.square().sum() for truth in right]).detach()
    ours, plain = errors.sqrt()
    last_place = torch.finfo(dtype).eps * sizes.sqrt() / 4  # a few dozen rows do not average it out
    assert (ours <= 1.1 * plain + last_place).all(), (ours / plain).tolist()


def test_the_gradient_of_the_head_is_summed_in_fp32_over_chunks(impl, models):
    hidden, head, theirs, teacher = models(rows=24, vocab=80, dtype=torch.bfloat16, bias=False)
    whole, cut = (
        torch.autograd.grad(
            linear_divergence(hidden, head, theirs, teacher, chunk_rows=rows, impl=impl).sum(), [head.weight]
        )[0]
        for rows in (24, 1)
    )
    assert (whole - cut).norm() <= torch.finfo(torch.bfloat16).eps * whole.norm()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"divergence": "kl"}, "unknown divergence 'kl'"),
        ({"divergence": "forward_kl", "beta": 0.5}, "takes no options"),
        ({"divergence": "skew_kl", "skwe": 0.5}, "unknown option 'skwe'; it takes skew"),
        ({"divergence": "skew_kl", "skew": 1.0}, r"skew must lie in \[0, 1\)"),
        ({"divergence": "generalised_jsd", "beta": 1.5}, r"beta must lie in \[0, 1\]"),
        ({"divergence": "taid_kl"}, "needs the option 't'"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"divergence": [Term("forward_kl")], "skew": 0.1}, "options belong into the Term"),
        ({"divergence": "cross_entropy"}, "needs labels="),
        ({"measures": ["entropy"]}, "unknown measure 'entropy'"),
        ({"measures": ["accuracy"]}, "accuracy needs labels="),
        ({"vocab": 302}, "vocab=302, but the student scores 301 ids"),
        ({"weights": torch.ones(4)}, "5 rows, weights 4"),
        ({"chunk_rows": 0}, "chunk_rows must be at least 1"),
        ({"impl": "cuda"}, "impl must be"),
    ],
)
def test_mistakes_are_refused_by_name(models, call, message):
    with pytest.raises(ValueError, match=message):
        linear_divergence(*models(), **call)


def test_heads_of_different_length_want_the_number_of_shared_ids(models):
    with pytest.raises(ValueError, match="301 ids and the teacher 310: pass vocab="):
        linear_divergence(*models(teacher_vocab=310))
    with pytest.raises(ValueError, match="needs the teacher's hidden states"):
        linear_divergence(*models()[:2])
    with pytest.raises(ValueError, match=r"\[rows, width\], got \[1, 5, 6\]"):
        hidden, *rest = models()
        linear_divergence(hidden[None], *rest)


def test_differentiating_twice_is_refused(models):
    hidden, *rest = models()
    value = linear_divergence(hidden, *rest).sum()
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(value, hidden, create_graph=True)
