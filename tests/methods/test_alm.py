"""ALM: chunks of text that both find equally likely, for any two tokenizers and any teacher that scores a text."""

import math
from typing import Any

import pytest
import torch
from readers import reader
from transformers import LlamaConfig, LlamaForCausalLM
from two_tokenizers import OURS, TEXTS, THEIRS, pair_collator, paired_rows, unaligned

from kdlm.losses import CrossEntropy, ForwardKL, kept_rows
from kdlm.methods import ALM, Step
from kdlm.methods.cross_tokenizer.aligned import Readings
from kdlm.methods.cross_tokenizer.debiasing import log_mass, merged, word_starts
from kdlm.models import Predictor
from kdlm.signal import Dense, Head, Hidden, LogProbs, Mixture, Rows, Sampled, TopK, domain_id, sequence_of
from kdlm.spelling import Spelling
from kdlm.teachers import ByDomain, Ensemble, LocalTeacher


def model(of: str, seed: int) -> Any:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(reader(of)),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).double()


def nets(student: Any, teacher: Any) -> dict[str, Any]:
    return {"student": Predictor(student), "teacher": teacher}


def step(method: ALM, student: Any, teacher: Any, batch: dict[str, Any]) -> Any:
    return method.losses(nets(student, teacher), batch, frozenset({"student"}), Step(0, 1))


class Says:
    """A teacher that turns the log-probabilities of a local one into another signal."""

    provides = frozenset({"teacher"})

    def __init__(self, model: Any, change: Any):
        self.local, self.change = LocalTeacher(model), change

    def __call__(self, batch: dict[str, Any], rows: Rows) -> Any:
        signal: Any = self.local(batch, rows)
        return self.change(signal.head.logits(signal.hidden).log_softmax(-1), rows.labels)


def own(log_p: torch.Tensor, labels: torch.Tensor) -> LogProbs:
    return LogProbs(log_p.gather(-1, labels[:, None])[:, 0])


def test_with_one_tokenizer_at_temperature_1_it_is_binary_cross_entropy_token_by_token() -> None:
    batch = pair_collator(THEIRS, THEIRS)(paired_rows(ours=THEIRS))
    student, teacher = model(THEIRS, 1), model(THEIRS, 2)
    terms = step(ALM(temperature=1.0), student, LocalTeacher(teacher), batch)
    asked = {name: batch[name] for name in ("input_ids", "attention_mask")}
    expected, count = torch.zeros(()).double(), 0
    q, p = (one(**asked).logits.softmax(-1) for one in (student, teacher))
    for row, labels in enumerate(batch["labels"]):
        for place in range(1, len(labels)):
            if labels[place] != -100:
                said, meant = q[row, place - 1, labels[place]], p[row, place - 1, labels[place]]
                expected = expected - meant * said.log() - (1 - meant) * (1 - said).log()
                count += 1
    assert count == ALM().counts(batch)["chunks"] == ALM().counts(batch)["tokens"] > 100
    assert (terms.terms["alm"].sum / count).item() == pytest.approx((expected / count).item(), abs=1e-5)
    ours = torch.autograd.grad(terms.terms["alm"].sum, student.lm_head.weight, retain_graph=True)[0]
    exact = torch.autograd.grad(expected, student.lm_head.weight)[0]
    torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 100.0])
def test_a_student_that_is_its_teacher_has_no_gradient(temperature: float) -> None:
    batch = pair_collator(THEIRS, THEIRS)(paired_rows(ours=THEIRS))
    student = model(THEIRS, 1)
    terms = step(ALM(temperature=temperature), student, LocalTeacher(model(THEIRS, 1)), batch)
    terms.terms["alm"].sum.backward()
    assert max(p.grad.abs().max().item() for p in student.parameters()) < 1e-9
    assert terms.metrics["chunk_kl"][0].item() == pytest.approx(0.0, abs=1e-9)


def readings(log_q: list[float], chunks: list[int], log_p: list[float], their_chunks: list[int]) -> Readings:
    """What two readings say, with these log-probabilities of their own tokens: token 0 of a vocabulary of two."""

    def dense(values: list[float]) -> tuple[Rows, Dense]:
        first = torch.tensor(values, dtype=torch.float64)
        logits = torch.stack([first, torch.log(-torch.expm1(first))], -1).requires_grad_()
        rows = Rows(torch.arange(len(values)), torch.zeros(len(values), dtype=torch.long))
        return rows, Dense(logits)

    (rows, student), (their_rows, teacher) = dense(log_q), dense(log_p)
    return Readings(rows, student, torch.tensor(chunks), their_rows, teacher, torch.tensor(their_chunks))


def match(method: ALM, said: Readings) -> Any:
    return method.match(said, {}, {}, Step(0, 1))


def test_a_chunk_of_two_tokens_has_their_summed_log_probability() -> None:
    split = readings([-0.5, -0.25, -1.0], [0, 0, 1], [-0.8, -0.4, -0.2], [0, 1, 1])
    whole = readings([-0.75, -1.0], [0, 1], [-0.8, -0.6], [0, 1])
    for method in (ALM(), ALM(temperature=1.0), ALM(divergence="k2")):
        torch.testing.assert_close(match(method, split).terms["alm"].sum, match(method, whole).terms["alm"].sum)
    gradient = torch.autograd.grad(match(ALM(), split).terms["alm"].sum, split.student.logits)[0]
    assert gradient[0, 0] / (1 - math.exp(-0.5)) == pytest.approx(gradient[1, 0] / (1 - math.exp(-0.25)))


def test_tokens_in_no_chunk_take_no_part() -> None:
    with_them = readings([-0.5, -0.7, -9.0], [0, 1, -1], [-0.1, -3.0, -0.2], [0, -1, 1])
    without = readings([-0.5, -0.7], [0, 1], [-0.1, -0.2], [0, 1])
    torch.testing.assert_close(match(ALM(), with_them).terms["alm"].sum, match(ALM(), without).terms["alm"].sum)
    assert match(ALM(), with_them).metrics["in_chunks"][0] == 2


def test_long_chunks_are_left_out_by_the_side_that_has_fewer_tokens() -> None:
    said = readings([-0.5] * 5, [0, 0, 0, 0, 1], [-0.1] * 5, [0, 0, 0, 1, 1])
    only = readings([-0.5], [0], [-0.1] * 2, [0, 0])
    capped = match(ALM(max_tokens=2), said)
    torch.testing.assert_close(capped.terms["alm"].sum, match(ALM(), only).terms["alm"].sum)
    assert capped.metrics["left_out"] == (1, "chunks") and match(ALM(max_tokens=3), said).metrics["left_out"][0] == 0
    gradient = torch.autograd.grad(capped.terms["alm"].sum, said.student.logits)[0]
    assert gradient[:4].abs().max() == 0 and gradient[4].abs().max() > 0


def test_per_token_a_chunk_weighs_as_many_as_the_teacher_has_in_it() -> None:
    said = readings([-0.5, -0.7], [0, 1], [-0.1, -0.2, -0.3], [0, 0, 1])
    first, second = readings([-0.5], [0], [-0.3], [0]), readings([-0.7], [0], [-0.3], [0])
    term = match(ALM(per="token"), said).terms["alm"]
    expected = 2 * match(ALM(), first).terms["alm"].sum + match(ALM(), second).terms["alm"].sum
    assert term.unit == "their_tokens"
    torch.testing.assert_close(term.sum, expected)


def test_what_is_logged_of_chunks_counts_them() -> None:
    batch = pair_collator()(paired_rows())
    method = ALM()
    counts = method.counts(batch)
    terms = step(method, model(OURS, 1), LocalTeacher(model(THEIRS, 2)), batch)
    inside = int(((batch["chunks"] >= 0) & (batch["labels"] != -100)).sum())
    assert terms.metrics["in_chunks"] == (inside, "tokens") and 0 < inside <= counts["tokens"]
    assert terms.metrics["tokens_per_chunk"] == (inside, "chunks") and 0 < counts["chunks"] < inside


@pytest.mark.parametrize("kind", ["log_probs", "mixture", "dense"])
def test_every_signal_that_scores_the_text_says_the_same(kind: str) -> None:
    change = {
        "log_probs": own,
        "mixture": lambda log_p, labels: Mixture(
            (Dense(log_p), Dense(log_p)), log_p.new_full((len(log_p), 2), -math.log(2))
        ),
        "dense": lambda log_p, labels: Dense(log_p),
    }[kind]
    batch, student, teacher = pair_collator()(paired_rows()), model(OURS, 1), model(THEIRS, 2)
    expected = step(ALM(), student, LocalTeacher(teacher), batch).terms["alm"].sum
    said = step(ALM(), student, Says(teacher, change), batch)
    torch.testing.assert_close(said.terms["alm"].sum, expected, rtol=1e-6, atol=1e-6)
    evaluated = ALM().evaluate(nets(student, Says(teacher, change)), batch, Step(0, 1))
    assert evaluated.metrics["teacher_bits_per_byte"][0] > 0


@pytest.mark.parametrize("way", ["probability", "log", "by_domain"])
def test_an_ensemble_reads_with_its_own_tokenizer_and_is_the_mean_of_what_its_members_say(way: Any) -> None:
    rows = [{**row, "domain": domain_id("ab"[row["index"] % 2])} for row in paired_rows()]
    batch, student, first, second = pair_collator()(rows), model(OURS, 1), model(THEIRS, 2), model(THEIRS, 3)
    which = kept_rows(batch["theirs"]["labels"]).select(sequence_of(batch["theirs"])) % 2

    def mean(log_p: torch.Tensor, labels: torch.Tensor) -> Dense:
        hidden: Any = LocalTeacher(second)(batch["theirs"], kept_rows(batch["theirs"]["labels"]))
        other = hidden.head.logits(hidden.hidden).log_softmax(-1)
        if way == "by_domain":
            return Dense(log_p.where(which[:, None] == 0, other))
        return Dense(0.7 * log_p + 0.3 * other if way == "log" else (0.7 * log_p.exp() + 0.3 * other.exp()).log())

    members = [LocalTeacher(first), LocalTeacher(second)]
    routed = ByDomain(table={"a": [1, 0], "b": [0, 1]})
    ensemble = Ensemble(members, routed) if way == "by_domain" else Ensemble(members, [7, 3], space=way)
    expected = step(ALM(), student, Says(first, mean), batch).terms["alm"].sum
    alone = step(ALM(), student, members[0], batch).terms["alm"].sum
    said = step(ALM(), student, ensemble, batch).terms["alm"].sum
    torch.testing.assert_close(said, expected, rtol=1e-9, atol=1e-9)
    assert (said - alone).abs() > 1e-2


def test_of_the_k_best_those_chunks_count_whose_every_token_is_among_them() -> None:
    def best(log_p: torch.Tensor, labels: torch.Tensor) -> TopK:
        found = log_p.topk(40)
        return TopK(found.indices, found.values)

    def unknown(log_p: torch.Tensor, labels: torch.Tensor) -> LogProbs:
        known = (log_p.topk(40).indices == labels[:, None]).any(-1)
        return LogProbs(own(log_p, labels).log_probs.masked_fill(~known, -math.inf))

    batch, student, teacher = pair_collator()(paired_rows()), model(OURS, 1), model(THEIRS, 2)
    said = step(ALM(), student, Says(teacher, best), batch)
    expected = step(ALM(), student, Says(teacher, unknown), batch)
    torch.testing.assert_close(said.terms["alm"].sum, expected.terms["alm"].sum, rtol=1e-6, atol=1e-6)
    assert 0 < said.metrics["left_out"][0] < ALM().counts(batch)["chunks"]
    for divergence in ("absolute", "k2", "reverse_kl"):
        term = step(ALM(divergence=divergence), student, Says(teacher, best), batch).terms["alm"].sum
        assert all(g.isfinite().all() for g in torch.autograd.grad(term, list(student.parameters())))
    assert "teacher_bits_per_byte" not in ALM().evaluate(nets(student, Says(teacher, best)), batch, Step(0, 1)).metrics


def test_tokens_that_were_drawn_say_nothing_of_the_text() -> None:
    def drawn(log_p: torch.Tensor, labels: torch.Tensor) -> Sampled:
        return Sampled(labels[:, None], torch.ones(len(labels), 1))

    batch = pair_collator()(paired_rows())
    with pytest.raises(ValueError, match="got a Sampled signal"):
        step(ALM(), model(OURS, 1), Says(model(THEIRS, 2), drawn), batch)


def test_a_batch_without_a_chunk_has_loss_0_and_a_gradient_of_zeros() -> None:
    student = model(OURS, 1)
    for row in (unaligned(paired_rows()[0]), paired_rows(["y"])[0]):
        terms = step(ALM(), student, LocalTeacher(model(THEIRS, 2)), pair_collator()([unaligned(row)]))
        gradients = torch.autograd.grad(terms.terms["alm"].sum, list(student.parameters()))
        assert terms.terms["alm"].sum == 0 and all((g == 0).all() for g in gradients)


def test_losses_that_compare_token_by_token_are_refused_and_those_of_the_student_added() -> None:
    with pytest.raises(ValueError, match="forward_kl compares token by token"):
        ALM([ForwardKL()])
    batch = pair_collator()(paired_rows(TEXTS[:3]))
    terms = step(ALM([CrossEntropy(weight=0.5)]), model(OURS, 1), LocalTeacher(model(THEIRS, 2)), batch)
    assert set(terms.terms) == {"alm", "token_loss"}


# Outcome-chunk debiasing


def test_the_mass_of_some_tokens_is_the_sum_of_their_probabilities() -> None:
    torch.manual_seed(0)
    hidden, ids = torch.randn(5, 8).double(), torch.tensor([3, 1, 12])
    head = Head(torch.randn(20, 8).double(), torch.randn(20).double(), logit_scale=0.5, softcap=3.0)
    expected = head.logits(hidden).softmax(-1)[:, ids].sum(-1).log()
    torch.testing.assert_close(log_mass(Hidden(hidden, head), ids), expected)
    torch.testing.assert_close(log_mass(Dense(head.logits(hidden)), ids), expected)


def test_words_begin_with_white_space_or_where_a_text_ends() -> None:
    for name in (OURS, THEIRS, "bytes"):
        one = reader(name)
        starts = set(word_starts(Spelling(one)).tolist())
        assert one.eos_token_id in starts and 0 < len(starts) < len(one)
        ids = one("a b\n", add_special_tokens=False)["input_ids"]
        assert ids[-1] in starts and {i for i in ids if i in starts} < set(ids)


def debiased(threshold: float, batch: dict[str, Any], teacher: Any = None, student: Any = None) -> Any:
    method = ALM(debias=threshold)
    method.introduce(Spelling(reader(OURS)), Spelling(reader(THEIRS)))
    student = model(OURS, 1) if student is None else student
    return step(method, student, LocalTeacher(model(THEIRS, 2)) if teacher is None else teacher, batch)


def test_at_threshold_0_no_chunk_is_merged_and_at_1_each_text_is_one() -> None:
    batch, texts = pair_collator()(paired_rows()), len(TEXTS)
    method = ALM()
    said = method.read(nets(model(OURS, 1), LocalTeacher(model(THEIRS, 2))), batch)
    starts = [word_starts(Spelling(reader(name))) for name in (OURS, THEIRS)]
    none, all_ = (merged(said, *starts, threshold) for threshold in (0.0, 1.0))
    assert torch.equal(none.readings.chunks, said.chunks) and none.size.max() == 1
    assert int(all_.readings.chunks.max()) + 1 == texts
    for whole in (none, all_):
        assert whole.size.sum() == method.counts(batch)["chunks"]
        assert torch.equal(whole.readings.lengths()[0] > 0, whole.readings.lengths()[1] > 0)
    assert (none.student[:-1] <= 0).all() and (none.teacher < 0).any()
    assert all_.student.abs().max() == 0, "nothing follows a whole text"


def test_merged_chunks_have_their_summed_log_probabilities_and_what_follows_is_that_of_the_last() -> None:
    batch = pair_collator()(paired_rows(TEXTS[:1]))
    said = ALM().read(nets(model(OURS, 1), LocalTeacher(model(THEIRS, 2))), batch)
    starts = [word_starts(Spelling(reader(name))) for name in (OURS, THEIRS)]
    apart = merged(said, *starts, 0.0)
    threshold = apart.teacher[apart.teacher < 0].median().exp().item()
    whole = merged(said, *starts, threshold)
    count = int(whole.readings.chunks.max()) + 1
    assert 1 < count < int(said.chunks.max()) + 1
    log_q = ALM().token_log_probs(said)
    sums, ends = said.over_chunks(log_q), torch.cumsum(whole.size[:count], 0)
    for number, (begin, end) in enumerate(zip([0, *ends.tolist()], ends.tolist(), strict=False)):
        torch.testing.assert_close(whole.readings.over_chunks(log_q)[number], sums[begin:end].sum())
        torch.testing.assert_close(whole.student[number], apart.student[end - 1])
        assert end == ends[-1] or whole.teacher[number].exp() > threshold


def test_debiased_a_student_that_is_its_teacher_has_no_gradient() -> None:
    batch, student = pair_collator(THEIRS, THEIRS)(paired_rows(ours=THEIRS)), model(THEIRS, 1)
    method = ALM(debias=0.1)
    method.introduce(*[Spelling(reader(THEIRS))] * 2)
    step(method, student, LocalTeacher(model(THEIRS, 1)), batch).terms["alm"].sum.backward()
    assert max(p.grad.abs().max().item() for p in student.parameters()) < 1e-9


def test_debiasing_has_a_gradient_and_none_without_chunks() -> None:
    for rows, moves in ((paired_rows(), True), ([unaligned(row) for row in paired_rows()], False)):
        student = model(OURS, 1)
        debiased(0.1, pair_collator()(rows), student=student).terms["alm"].sum.backward()
        assert (max(p.grad.abs().max().item() for p in student.parameters()) > 0) == moves


def test_debiasing_refuses_a_teacher_without_whole_distributions() -> None:
    batch = pair_collator()(paired_rows())
    with pytest.raises(ValueError, match="which a LogProbs signal does not give"):
        debiased(0.1, batch, teacher=Says(model(THEIRS, 2), own))
    assert ALM(debias=0.1).signals == {Hidden, Dense}
