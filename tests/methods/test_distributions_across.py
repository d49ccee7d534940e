"""ULD, GOLD, shared tokens and the projection: what they make of two readings of a text."""

import pytest
import torch
from paired_batches import STEP, Says, batch_of, introduced

from kdlm.losses import JSD, CrossEntropy, ForwardKL, TVDPlusPlus, generalised_jsd, sorted_l1, token_log_probs
from kdlm.methods import GOLD, ULD, SharedVocabularyKD, VocabularyProjection
from kdlm.methods.cross_tokenizer.uld import by_index
from kdlm.signal import Dense, Hidden, Mixture, Rows

BPE, UNIGRAM, BYTES = "tiny", "unigram-tiny", "bytes"
MADE = {
    "uld": lambda: ULD(),
    "uld_chunks": lambda: ULD(pairing="chunks", top_k=5),
    "gold": lambda: GOLD(),
    "gold_bayesian": lambda: GOLD(merge="bayesian", temperature=1.5),
    "gold_uld": lambda: GOLD(hybrid=False),
    "shared": lambda: SharedVocabularyKD([ForwardKL(temperature=2.0), JSD(weight=0.5), CrossEntropy(weight=0.1)]),
    "shared_renormalised": lambda: SharedVocabularyKD([JSD()], rest="renormalise"),
    "projection_turned": lambda: VocabularyProjection([ForwardKL(), CrossEntropy(weight=0.1)], onto="student"),
    "projection": lambda: VocabularyProjection([ForwardKL()]),
}


def nets(ours: int = 448, theirs: int = 512, k: int | None = None) -> dict:
    return {"student": Says(ours, 1), "teacher": Says(theirs, 2, k)}


def of_pair(name: str):
    return introduced(MADE[name](), UNIGRAM, BPE)


def mean(method, networks: dict, batch) -> torch.Tensor:
    """The step's loss: every term divided by its unit's count."""
    terms, counts = method.losses(networks, batch, frozenset({"student"}), STEP), method.counts(batch)
    return sum(term.weight * term.sum / counts[term.unit] for term in terms.terms.values())


@pytest.mark.parametrize("name", MADE)
def test_two_tokenizers_give_a_loss_whose_gradient_is_the_students_alone(name: str) -> None:
    method, networks, batch = of_pair(name), nets(), batch_of(UNIGRAM, BPE)
    mean(method, networks, batch).backward()
    assert networks["student"].table.grad.abs().sum() > 1e-3
    assert networks["student"].table.grad.isfinite().all()
    assert networks["teacher"].table.grad is None
    found = method.evaluate(networks, batch, STEP)
    assert {"bits_per_byte", "teacher_bits_per_byte"} <= set(found.metrics)


@pytest.mark.parametrize("name", MADE)
def test_padding_does_not_show(name: str) -> None:
    """Rows of logits depend on where they are, so those of the padded layout are handed to the other one."""
    padded, free = batch_of(UNIGRAM, BPE), batch_of(UNIGRAM, BPE, layout="padding_free")
    tables = {}

    def kept(role: str, says: Says):
        def answer(batch, rows: Rows) -> Dense:
            tables.setdefault(role, says(batch, rows))
            return tables[role]

        return answer

    networks = {role: kept(role, says) for role, says in nets().items()}
    torch.testing.assert_close(mean(of_pair(name), networks, padded), mean(of_pair(name), networks, free))


@pytest.mark.parametrize("name", ["gold", "gold_bayesian"])
def test_gold_with_one_tokenizer_is_the_generalised_jsd_of_each_token(name: str) -> None:
    method, batch, networks = MADE[name](), batch_of(BPE, BPE), nets(512)
    method.skip_eos = False
    introduced(method, BPE, BPE)
    readings = method.read(networks, batch)
    want = generalised_jsd(
        readings.student.logits, readings.teacher.logits, temperature=method.temperature, t_squared=False
    ).mean()
    torch.testing.assert_close(mean(method, networks, batch), want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["shared", "shared_renormalised", "projection", "projection_turned"])
def test_token_losses_with_one_tokenizer_are_the_plain_ones(name: str) -> None:
    method, batch, networks = introduced(MADE[name](), BPE, BPE), batch_of(BPE, BPE), nets(512)
    readings = method.read(networks, batch)
    student, teacher, labels = readings.student.logits, readings.teacher.logits, readings.rows.labels
    losses = [*method.compared.values(), *method.token_losses.values()]
    want = sum(loss.weight * loss(student, teacher, labels).mean() for loss in losses)
    torch.testing.assert_close(mean(method, networks, batch), want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("pairing", ["index", "chunks"])
def test_uld_with_one_tokenizer_compares_each_token(pairing: str) -> None:
    method, batch, networks = ULD(pairing=pairing), batch_of(BPE, BPE), nets(512)
    readings = method.read(networks, batch)
    want = 1.5 * sorted_l1(readings.student.logits, readings.teacher.logits).mean()
    torch.testing.assert_close(mean(method, networks, batch), want)
    metrics = method.match(readings, networks, batch, STEP).metrics
    assert metrics["aligned"][0] == len(readings.rows)


def test_uld_by_index_drifts_from_the_text_and_by_chunks_does_not() -> None:
    batch, networks = batch_of(UNIGRAM, BPE), nets()
    shares = {}
    for pairing in ("index", "chunks"):
        method = ULD(pairing=pairing)
        found = method.match(method.read(networks, batch), networks, batch, STEP).metrics["aligned"][0]
        shares[pairing] = float(found / method.counts(batch)["pairs"])
    assert shares["chunks"] == 1 and shares["index"] < 0.5


@pytest.mark.parametrize("merge", ["observed", "bayesian"])
def test_a_merged_row_gives_the_observed_text_the_probability_of_its_tokens(merge: str) -> None:
    method, networks, batch = introduced(GOLD(merge=merge), UNIGRAM, BPE), nets(), batch_of(UNIGRAM, BPE)
    readings = method.read(networks, batch)
    at = (readings.starts() if merge == "observed" else readings.ends())[0]
    own = token_log_probs(readings.student, readings.rows.labels)[0]
    others = method._others(readings.student, readings.rows, readings.chunks, at)
    assert (readings.lengths()[0] > 1).any(), "else nothing is merged"
    torch.testing.assert_close(own[at] + others, readings.over_chunks(own)[: len(at)])


def test_gold_reads_a_chunk_at_its_first_or_at_its_last_token() -> None:
    method, networks, batch = introduced(GOLD(), UNIGRAM, BPE), nets(), batch_of(UNIGRAM, BPE)
    readings = method.read(networks, batch)
    lengths = readings.lengths()
    for first, last, length in zip(readings.starts(), readings.ends(), lengths, strict=True):
        assert torch.equal(last - first + 1, length[: len(first)])


def test_the_ends_of_texts_are_left_out_of_gold_unless_they_are_wanted() -> None:
    batch = batch_of(UNIGRAM, BPE)
    skipped, whole = (introduced(GOLD(skip_eos=skip), UNIGRAM, BPE) for skip in (True, False))
    counts = [method.counts(batch)["groups"] for method in (skipped, whole)]
    assert counts[1] - counts[0] == 4 and counts[1] == batch["chunks"].max() + 1
    bare = batch_of(UNIGRAM, BPE, ended=False)
    torch.testing.assert_close(skipped.counts(bare)["groups"], whole.counts(bare)["groups"])
    found = skipped.match(skipped.read(nets(), batch), nets(), batch, STEP)
    assert found.terms["gold"].unit == "groups"


@pytest.mark.parametrize("name", ["uld", "uld_chunks", "shared", "projection"])
def test_a_teacher_of_a_few_tokens_is_enough(name: str) -> None:
    method, batch = of_pair(name), batch_of(UNIGRAM, BPE)
    if name == "shared":
        method = introduced(SharedVocabularyKD([ForwardKL(), CrossEntropy()]), UNIGRAM, BPE)
    networks = nets(k=8)
    mean(method, networks, batch).backward()
    assert networks["student"].table.grad.isfinite().all() and networks["student"].table.grad.abs().sum() > 1e-3


def test_a_teacher_of_longer_tokens_carried_to_bytes_is_its_law_of_the_next_byte() -> None:
    """Every token of the teacher determines the byte that begins it, so nothing is approximate."""
    method, batch = introduced(VocabularyProjection([ForwardKL()], onto="student"), BYTES, BPE), batch_of(BYTES, BPE)
    networks = nets(260)
    readings = method.read(networks, batch)
    value = method.match(readings, networks, batch, STEP).terms["outcomes"].sum
    starts, their_starts = readings.starts()
    p, q = readings.teacher.logits[their_starts].softmax(-1), readings.student.logits[starts].softmax(-1)
    ours, theirs = method.paired.ours, method.paired.theirs
    to = [ours.pieces.index(piece[:1]) for i, piece in enumerate(theirs.pieces) if i not in theirs.control]
    text = [i for i in range(512) if i not in theirs.control]
    law = torch.zeros(len(q), 260, dtype=torch.float64).index_add(1, torch.tensor(to), p[:, text])
    for mine, other in zip(*method.paired.matched, strict=True):
        if mine in ours.control:
            law[:, mine] += p[:, other]
    torch.testing.assert_close(law.sum(-1), torch.ones(len(q), dtype=torch.float64))
    torch.testing.assert_close(value, torch.xlogy(law, law / q).sum())


@pytest.mark.parametrize("name", ["uld", "shared", "projection", "projection_turned"])
def test_teachers_of_one_tokenizer_may_be_several(name: str) -> None:
    """Two that say the same are one."""
    method, networks, batch = of_pair(name), nets(), batch_of(UNIGRAM, BPE)
    one = networks["teacher"]

    def several(batch, rows: Rows) -> Mixture:
        return Mixture((one(batch, rows),) * 2, torch.full((len(rows), 2), 0.5, dtype=torch.float64).log())

    both = {**networks, "teacher": several}
    torch.testing.assert_close(mean(method, both, batch), mean(of_pair(name), networks, batch))
    with pytest.raises(ValueError, match="gold takes one teacher's logits, got a Mixture signal; average an ensemble"):
        mean(of_pair("gold"), both, batch)


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(ValueError, match="SharedVocabularyKD needs one that compares with the teacher"):
        SharedVocabularyKD([CrossEntropy()])
    with pytest.raises(ValueError, match="forward_kl compares token by token"):
        GOLD([ForwardKL()])
    assert SharedVocabularyKD([ForwardKL()], rest="renormalise").signals == {Hidden, Dense, Mixture}
    assert TVDPlusPlus().needs_teacher


def laid_out(turns: list[list[tuple[int, int]]], length: int = 12) -> tuple[Rows, dict]:
    """Rows that predict the tokens of these spans of each sequence, in the padded layout."""
    index = [b * length + t for b, spans in enumerate(turns) for start, stop in spans for t in range(start, stop)]
    batch = {"input_ids": torch.zeros(len(turns), length, dtype=torch.long)}
    return Rows(torch.tensor(index, dtype=torch.long), torch.zeros(len(index), dtype=torch.long)), batch


def test_answers_are_paired_in_order_and_cut_to_the_shorter_reading() -> None:
    ours, batch = laid_out([[(1, 3), (5, 9)], [(2, 4)], [], [(0, 2)]])
    theirs, other = laid_out([[(0, 3), (6, 8)], [], [(1, 2)], [(4, 7)]])
    pairs, their_pairs = by_index(ours, batch, theirs, other)
    positions = list(zip(ours.index[pairs].tolist(), theirs.index[their_pairs].tolist(), strict=True))
    assert positions == [(1, 0), (2, 1), (5, 6), (6, 7), (36, 40), (37, 41)]


@pytest.mark.parametrize("empty", [0, 1])
def test_no_answers_give_no_pairs(empty: int) -> None:
    sides = [laid_out([[(1, 3)]]), laid_out([[]])]
    (ours, batch), (theirs, other) = sides if empty else reversed(sides)
    assert all(len(side) == 0 for side in by_index(ours, batch, theirs, other))
