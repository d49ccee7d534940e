"""What a format promises: exact ids, bounded log-probabilities, exact tails, unbiased draws."""

import math

import pytest
import torch

from kdlm.losses import ForwardKL, chunked, forward_kl, kept_rows
from kdlm.losses.sampled import sampled_cross_entropy
from kdlm.losses.truncated import on_draws
from kdlm.signal import Dense, Head, Hidden, Sampled, TopK
from kdlm.store import HiddenFormat, LogProbsFormat, SampledFormat, TopKFormat
from kdlm.store.formats import Format, Record

ROWS, VOCAB, WIDTH = 37, 211, 24


def signal(dtype: torch.dtype = torch.float32, rows: int = ROWS) -> Hidden:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(rows, WIDTH, generator=generator, dtype=torch.float64)
    head = Head(torch.randn(VOCAB, WIDTH, generator=generator, dtype=torch.float64).to(dtype) * 0.7)
    return Hidden(hidden.to(dtype), head)


def observed(format: Format, shared: int | torch.Tensor = VOCAB, given: Hidden | Dense | None = None) -> Record:
    labels = torch.arange(ROWS) * 5 % VOCAB
    return format.observe(given or signal(), shared, labels, torch.Generator().manual_seed(0))


def round_trip(format: Format, record: Record) -> Record:
    rows = len(next(iter(record.values())))
    return format.unpack([format.raw(format.pack(record), rows)])


def dense(given: Hidden) -> torch.Tensor:
    return given.head.logits(given.hidden).float()


@pytest.mark.parametrize("k", [1, 2, 32, VOCAB])
@pytest.mark.parametrize("step", [1 / 16, 0.5])
def test_top_k_keeps_ids_and_tail_exactly_and_log_probabilities_within_its_step(k: int, step: float) -> None:
    format = TopKFormat(k=k, step=step)
    record = observed(format)
    found = round_trip(format, record)
    logs = dense(signal()).log_softmax(-1)
    want = logs.topk(k)
    assert torch.equal(found["ids"].sort(-1).values, want.indices.sort(-1).values)
    assert (found["ids"].diff(dim=-1) > 0).all()
    assert (found["log_probs"] - logs.gather(-1, found["ids"])).abs().max() <= step
    assert torch.equal(found["log_tail"], record["log_tail"]) and torch.equal(found["lse"], record["lse"])
    kept = found["log_probs"].double().exp().sum(-1)
    torch.testing.assert_close(kept + found["log_tail"].double().exp(), torch.ones(ROWS).double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(found["lse"], dense(signal()).logsumexp(-1))


def test_the_reconstruction_is_as_close_as_the_docstring_says() -> None:
    format = TopKFormat(k=VOCAB)
    found = round_trip(format, observed(format))
    true = dense(signal()).log_softmax(-1)
    kl = (true.exp() * (true - found["log_probs"])).sum(-1)
    assert 0 <= kl.mean() < format.step**2 / 24 * 1.2


def test_a_sure_teacher_keeps_its_bound() -> None:
    """exp(-80) beside a probability of nearly 1 fits into the codes."""
    logits = torch.full((3, 50), -80.0).scatter(-1, torch.tensor([[7], [0], [49]]), 0.0) + torch.rand(3, 50)
    format = TopKFormat(k=8)
    record = format.observe(Dense(logits), 50, torch.zeros(3).long(), torch.Generator())
    found = round_trip(format, record)
    true = logits.log_softmax(-1).gather(-1, found["ids"])
    assert (found["log_probs"] - true).abs().max() <= format.step


def test_a_row_without_a_tail_has_none() -> None:
    format = TopKFormat(k=VOCAB)
    record = observed(format)
    assert (record["log_tail"] == -math.inf).all()
    assert round_trip(format, record)["log_probs"].isfinite().all()


def test_only_the_shared_ids_have_probability() -> None:
    few, some = 100, torch.tensor([3, 5, 8, *range(20, 90)])
    for shared in (few, some):
        ids = torch.arange(few) if isinstance(shared, int) else shared
        found = observed(TopKFormat(k=10), shared)
        logs = dense(signal())[:, ids].log_softmax(-1)
        assert set(found["ids"].flatten().tolist()) <= set(ids.tolist())
        want = logs.topk(10).values.sort(-1).values
        torch.testing.assert_close(found["log_probs"].sort(-1).values, want)
        assert set(observed(SampledFormat(), shared)["ids"].flatten().tolist()) <= set(ids.tolist()) | {0}


@pytest.mark.parametrize("draws", [1, 12, 300])
def test_draws_come_back_and_count_to_their_number(draws: int) -> None:
    format = SampledFormat(draws=draws)
    record = observed(format)
    found = round_trip(format, record)
    assert torch.equal(found["ids"] * (found["counts"] > 0), record["ids"] * (record["counts"] > 0))
    assert torch.equal(found["counts"], record["counts"])
    assert (found["counts"].sum(-1) == draws).all()


def test_draws_of_different_widths_are_joined_with_counts_of_0() -> None:
    format = SampledFormat()
    one = {"ids": torch.tensor([[3, 4]]), "counts": torch.tensor([[1.0, 2.0]])}
    other = {"ids": torch.tensor([[9]]), "counts": torch.tensor([[3.0]])}
    joined = format.joined([one, other])
    assert joined["counts"].tolist() == [[1, 2], [3, 0]]


def test_the_mean_gradient_of_draws_is_that_of_the_whole_teacher_and_that_of_top_k_is_not() -> None:
    """Check P of random-sampling KD: over many captures, within four standard errors, in every coordinate."""
    teacher = signal(rows=4)
    torch.manual_seed(3)
    student = (dense(teacher) + torch.randn(4, VOCAB)).requires_grad_()
    whole = torch.autograd.grad(forward_kl(student, dense(teacher)).sum(), student)[0]
    grads = []
    for seed in range(400):
        format = SampledFormat(draws=50, seed=seed)
        record = round_trip(
            format, format.observe(teacher, VOCAB, torch.zeros(4).long(), torch.Generator().manual_seed(seed))
        )
        drawn = format.signal(record, None)
        assert isinstance(drawn, Sampled)
        grads.append(torch.autograd.grad(sampled_cross_entropy(student, drawn).sum(), student)[0])
    p = dense(teacher).softmax(-1)
    seen = p * 50 * len(grads) > 30  # rarer tokens are drawn too seldom for a normal law
    error = (p * (1 - p) / (50 * len(grads))).sqrt()
    z = ((torch.stack(grads).mean(0) - whole) / error)[seen]
    assert seen.sum() > 40 and z.abs().max() < 5 and z.square().mean() < 1.5
    few = TopKFormat(k=12).observe(teacher, VOCAB, torch.zeros(4).long(), torch.Generator())
    renormalised = torch.zeros(4, VOCAB).scatter(-1, few["ids"], few["log_probs"].softmax(-1))
    biased = student.softmax(-1) - renormalised
    assert ((biased - whole) / error)[seen].abs().max() > 10


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 0.0), ("bfloat16", 2**-8), ("float8", 2**-4)])
def test_hidden_states_come_back_up_to_the_rounding_of_their_dtype(dtype: str, bound: float) -> None:
    format = HiddenFormat(dtype=dtype)
    record = observed(format)
    found = round_trip(format, record)["hidden"].float()
    largest = record["hidden"].abs().amax(-1, keepdim=True)
    relative = (found - record["hidden"]).abs() / torch.maximum(record["hidden"].abs(), largest * 2**-9)
    assert relative.max() <= bound


def test_hidden_of_a_bf16_teacher_is_exact_in_bf16() -> None:
    given = signal(torch.bfloat16)
    format = HiddenFormat()
    found = format.signal(round_trip(format, observed(format, given=given)), given.head)
    assert isinstance(found, Hidden) and torch.equal(found.hidden, given.hidden)


def test_hidden_is_refused_for_a_teacher_that_gives_logits() -> None:
    with pytest.raises(ValueError, match=r"not head\(hidden\); use top_k"):
        observed(HiddenFormat(), given=Dense(torch.zeros(ROWS, VOCAB)))


def test_logprobs_are_those_of_the_next_tokens() -> None:
    labels = torch.arange(ROWS) * 5 % VOCAB
    found = observed(LogProbsFormat())["log_probs"]
    torch.testing.assert_close(found, dense(signal()).log_softmax(-1).gather(-1, labels[:, None]).squeeze(-1))
    shared = torch.arange(0, VOCAB, 2)
    some = observed(LogProbsFormat(), shared)["log_probs"]
    assert (some.isinf() == (labels % 2 == 1)).all()


def test_a_long_capture_in_blocks_is_that_of_one_block(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = observed(TopKFormat(k=9))
    monkeypatch.setattr("kdlm.store.formats._LOGITS", 5 * VOCAB)
    for name, values in observed(TopKFormat(k=9)).items():
        torch.testing.assert_close(values, whole[name])


def test_no_rows_give_an_empty_record() -> None:
    for format in (TopKFormat(k=4), SampledFormat(), HiddenFormat(), LogProbsFormat()):
        none = format.observe(signal(rows=0), VOCAB, torch.zeros(0).long(), torch.Generator())
        assert {len(values) for values in none.values()} == {0}


def test_the_signal_is_what_losses_take() -> None:
    format = TopKFormat(k=7)
    found = format.signal(round_trip(format, observed(format)), None)
    assert isinstance(found, TopK) and found.ids.dtype == torch.int64
    assert len(kept_rows(torch.tensor([[-100, 3, 4]]))) == 2


def test_a_server_s_top_tokens_are_kept_with_the_tail_that_they_leave() -> None:
    logs = dense(signal()).log_softmax(-1)
    best = logs.topk(9)
    format = TopKFormat(k=6)
    found = format.observe(TopK(best.indices, best.values), VOCAB, torch.zeros(ROWS).long(), torch.Generator())
    want = observed(format)
    assert torch.equal(found["ids"], want["ids"]) and "lse" not in found
    torch.testing.assert_close(found["log_tail"], want["log_tail"], rtol=1e-4, atol=1e-5)
    back = round_trip(format, found)
    assert (back["log_probs"] - want["log_probs"]).abs().max() <= format.step
    with pytest.raises(ValueError, match="SampledFormat cannot be made from a TopK signal"):
        SampledFormat().observe(TopK(best.indices, best.values), VOCAB, torch.zeros(ROWS).long(), torch.Generator())


def drawn(k: int, draws: int, seed: int, given: Hidden) -> TopK:
    """Capture exactly, without rounding, so that what is tested are the draws."""
    format, generator = TopKFormat(k=k, tail_draws=draws), torch.Generator().manual_seed(seed)
    record = format.observe(given, VOCAB, torch.zeros(len(given.hidden)).long(), generator)
    found = format.signal(record, None)
    assert isinstance(found, TopK)
    return found


def test_draws_from_the_rest_come_back_and_lie_outside_of_the_top() -> None:
    format = TopKFormat(k=12, tail_draws=6)
    record = observed(format)
    found = round_trip(format, record)
    kept = record["drawn_counts"] > 0
    assert (record["drawn_counts"].sum(-1) == 6).all()
    assert torch.equal(found["drawn_counts"], record["drawn_counts"])
    assert torch.equal(found["drawn_ids"][kept], record["drawn_ids"][kept])
    assert (found["drawn_log_probs"] - record["drawn_log_probs"])[kept].abs().max() <= format.step / 2 + 1e-6
    inside = (record["drawn_ids"][:, :, None] == record["ids"][:, None]).any(-1)
    assert not inside[kept].any()
    logs = dense(signal()).log_softmax(-1)
    torch.testing.assert_close(record["drawn_log_probs"][kept], logs.gather(-1, record["drawn_ids"])[kept])


def test_the_mean_gradient_of_a_top_with_draws_is_that_of_the_whole_teacher() -> None:
    """Within five standard errors where the teacher is drawn from, to rounding where it is known; the bucket is not."""
    teacher = signal(rows=4)
    torch.manual_seed(3)
    student = (dense(teacher) + torch.randn(4, VOCAB)).requires_grad_()
    whole = torch.autograd.grad(forward_kl(student, dense(teacher)).sum(), student)[0]
    signals = [drawn(12, 8, seed, teacher) for seed in range(400)]
    grads = torch.stack([torch.autograd.grad(on_draws(student, one).sum(), student)[0] for one in signals])
    p = dense(teacher).softmax(-1)
    top = torch.zeros_like(p).scatter(-1, signals[0].ids, 1.0).bool()
    torch.testing.assert_close(grads.mean(0)[top], whole[top], rtol=1e-4, atol=1e-6)
    rest = p.masked_fill(top, 0.0).sum(-1, keepdim=True)
    share = p / rest
    error = rest * (share * (1 - share) / (8 * len(grads))).sqrt()
    seen = ~top & (share * 8 * len(grads) > 30)
    z = ((grads.mean(0) - whole) / error)[seen]
    assert seen.sum() > 30 and z.abs().max() < 5 and z.square().mean() < 1.5
    bucket = ForwardKL()(student, TopK(signals[0].ids, signals[0].log_probs)).sum()
    biased = torch.autograd.grad(bucket, student)[0]
    assert ((biased - whole) / error)[seen].abs().max() > 10


def test_draws_give_0_at_equality_and_the_divergence_on_average() -> None:
    teacher = signal(rows=6)
    torch.testing.assert_close(on_draws(dense(teacher), drawn(5, 3, 0, teacher)), torch.zeros(6), rtol=0, atol=1e-5)
    student = dense(teacher) + torch.randn(6, VOCAB)
    found = torch.stack([on_draws(student, drawn(5, 3, seed, teacher)) for seed in range(500)])
    expected = forward_kl(student, dense(teacher))
    assert ((found.mean(0) - expected) / (found.std(0) / 500**0.5)).abs().max() < 5


def test_a_top_that_is_everything_needs_no_draws() -> None:
    one = drawn(VOCAB, 4, 0, signal())
    assert one.draws is None
    student = dense(signal()) + torch.randn(ROWS, VOCAB)
    torch.testing.assert_close(ForwardKL()(student, one), forward_kl(student, dense(signal())), rtol=1e-4, atol=1e-5)


def test_fused_and_eager_losses_agree_on_draws_and_leave_the_others_their_bucket() -> None:
    from kdlm.losses import CrossEntropy, ReverseKL, weighted_sum

    given, labels = drawn(9, 4, 0, signal()), torch.arange(ROWS) * 5 % VOCAB
    student = Hidden(torch.randn(ROWS, WIDTH, requires_grad=True), Head(torch.randn(VOCAB, WIDTH) * 0.5))
    logits = student.head.logits(student.hidden)
    for losses in (
        [ForwardKL()],
        [ForwardKL(weight=0.7), CrossEntropy(weight=0.3)],
        [ForwardKL(), ReverseKL(weight=0.5)],
    ):
        terms = [(loss.name, loss, loss.weight) for loss in losses]
        total, parts = weighted_sum(terms, student, given, labels, measures=("kl_to_teacher",))
        plain = sum(loss.weight * loss(logits, given, labels) for loss in losses)
        torch.testing.assert_close(total, plain, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(parts["kl_to_teacher"], on_draws(logits, given).detach(), rtol=1e-4, atol=1e-5)
        ours, theirs = (torch.autograd.grad(x.sum(), student.hidden, retain_graph=True)[0] for x in (total, plain))
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
    weights = torch.rand(ROWS)
    total = chunked(ForwardKL(), student, given, weights=weights)
    torch.testing.assert_close(total, weights * on_draws(logits, given), rtol=1e-4, atol=1e-5)


def test_finite_differences_agree_with_the_gradient_of_draws() -> None:
    given = drawn(7, 3, 0, signal(rows=3))
    student = torch.randn(3, VOCAB, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: on_draws(x, given), (student,))
