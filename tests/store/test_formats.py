"""What a format promises: exact ids, bounded log-probabilities, exact tails, unbiased draws."""

import math

import pytest
import torch

from kdlm.losses import forward_kl, kept_rows
from kdlm.losses.sampled import sampled_cross_entropy
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
    return format.unpack(format.pack(record), rows)


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
