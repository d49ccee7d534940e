"""What measuring says of a student beside its teacher: laws, and the same figures however the rows are laid out."""

import copy
import json
import math

import numpy as np
import pytest
import torch

from kdlm.data import collator_for
from kdlm.estimates import ratio
from kdlm.losses import kept_rows
from kdlm.measuring import Reader, derived, measure
from kdlm.measuring.measure import tallied
from kdlm.metrics import gap_closed
from kdlm.teachers import LocalTeacher

ROWS = 24


def values(measured: dict) -> dict[str, float]:
    return {name: figure["value"] for name, figure in measured["metrics"].items()}


def same(left: dict, right: dict, tolerance: float = 1e-9) -> None:
    assert left["tokens"] == right["tokens"] and left["documents"] == right["documents"]
    for name, figure in right["metrics"].items():
        assert left["metrics"][name] == pytest.approx(figure, rel=tolerance, abs=tolerance), name
    for side, diagram in right["reliability"].items():
        assert left["reliability"][side]["count"] == diagram["count"]


@pytest.fixture
def rows(load):
    return load().train.select(range(ROWS))


@pytest.fixture
def measured(student, teacher, rows, tokenizer):
    return measure(student, teacher, rows, tokenizer)


def test_figures_are_those_of_a_plain_loop_over_whole_logits(student, teacher, rows, tokenizer, measured):
    nats, theirs, divergence, accepted, spelt, count = 0.0, 0.0, 0.0, 0.0, 0, 0
    for row in rows:
        ids = torch.as_tensor(np.array(row["input_ids"]))[None]
        with torch.no_grad():
            q, p = (model(ids).logits[0, :-1].log_softmax(-1) for model in (student, teacher))
        following = ids[0, 1:]
        nats -= q.gather(1, following[:, None]).sum().item()
        theirs -= p.gather(1, following[:, None]).sum().item()
        divergence += (p.exp() * (p - q)).sum().item()
        accepted += torch.minimum(p, q).exp().sum().item()
        spelt += len(tokenizer.decode(following).encode())
        count += len(following)
    found = values(measured)
    assert measured["tokens"] == count
    assert found["cross_entropy"] == pytest.approx(nats / count)
    assert found["perplexity"] == pytest.approx(math.exp(nats / count))
    assert found["teacher_cross_entropy"] == pytest.approx(theirs / count)
    assert found["kl_to_teacher"] == pytest.approx(divergence / count)
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / spelt)
    assert found["teacher_bits_per_byte"] == pytest.approx(theirs / math.log(2) / spelt)
    rate = accepted / count
    assert found["block_efficiency"] == pytest.approx((1 - rate**6) / (1 - rate))


def test_batches_padding_and_order_change_nothing(student, teacher, rows, tokenizer, measured):
    same(measure(student, teacher, rows, tokenizer, batch_size=1), measured)
    same(measure(student, teacher, rows, tokenizer, batch_size=5, chunk_rows=7), measured)
    backwards = [rows[number] for number in reversed(range(ROWS))]
    same(measure(student, teacher, backwards, tokenizer, batch_size=7), measured)


def test_single_precision_gives_the_same_figures(student, teacher, rows, tokenizer, measured):
    singles = [copy.deepcopy(model).float() for model in (student, teacher)]
    for size in (1, 24):
        same(measure(*singles, rows, tokenizer, batch_size=size), measured, 1e-6)


def test_packing_changes_nothing(student, teacher, load, tokenizer, tmp_path):
    path = tmp_path / "rows.jsonl"
    pairs = [{"prompt": f"def f{n}(x):\n", "completion": f"    return {'x + ' * n}{n}\n"} for n in range(9)]
    path.write_text("".join(f"{json.dumps(pair)}\n" for pair in pairs))
    plain, packed = (load(train=[{"path": str(path)}], packing=packing) for packing in ("none", "pack"))
    assert len(packed.train) < len(plain.train) == len(pairs)
    right = measure(student, teacher, plain.train, tokenizer)
    same(measure(student, teacher, packed.train, tokenizer, batch_size=2), right)
    same(measure(student, teacher, plain.train, tokenizer, collate=packed.collator), right)  # padding_free


def test_ranks_add_up(student, teacher, rows, tokenizer, measured):
    reader = Reader(student, teacher, tokenizer=tokenizer)
    shares = [tallied(reader, rows.select(range(rank, ROWS, 2)), tokenizer) for rank in (0, 1)]
    same((shares[0] + shares[1]).measured(), measured)


def test_a_student_that_is_its_teacher_has_lost_nothing(teacher, rows, tokenizer):
    found = values(measure(teacher, copy.deepcopy(teacher), rows, tokenizer, start=teacher))
    for name in ("kl_to_teacher", "reverse_kl_to_teacher", "kl_to_start"):
        assert found[name] == pytest.approx(0, abs=1e-12)
    for name in ("top1_agreement", "top5_agreement", "acceptance_rate"):
        assert found[name] == pytest.approx(1)
    assert found["block_efficiency"] == pytest.approx(6)
    for name in ("cross_entropy", "ece", "brier", "perplexity", "bits_per_byte"):
        assert found[name] == pytest.approx(found[f"teacher_{name}"])
    assert "gap_closed" in found  # of no gap at all
    assert found["gap_closed"] is None


def test_forgetting_and_the_gap_are_measured_from_the_start_or_a_baseline(student, teacher, rows, tokenizer):
    found = values(measure(student, teacher, rows, tokenizer, start=student))
    assert found["kl_to_start"] == pytest.approx(0, abs=1e-12) and found["gap_closed"] == pytest.approx(0)
    whole = values(measure(teacher, teacher, rows, tokenizer, start=student))
    assert whole["gap_closed"] == pytest.approx(1)
    backwards = values(measure(teacher, student, rows, tokenizer))
    assert whole["kl_to_start"] == pytest.approx(backwards["kl_to_teacher"])
    from_baseline = values(measure(student, teacher, rows, tokenizer, start=student, baseline=teacher))
    assert from_baseline["gap_closed"] is None  # the baseline is as good as the teacher
    assert gap_closed(3.0, 2.5, 2.0) == 0.5
    assert math.isnan(gap_closed(3.0, 2.5, 3.0 + 1e-12))


def test_errors_are_over_documents_and_pieces_of_one_text_are_one_document(student, teacher, load, tokenizer):
    data = load(eval_rows=2)
    documents = data.documents["eval"]
    rows = data.eval.select(range(0, len(data.eval), 40))
    apart = measure(student, teacher, rows, tokenizer, names=["cross_entropy"])
    together = measure(student, teacher, rows, tokenizer, names=["cross_entropy"], documents=documents)
    assert apart["documents"] == len(rows) and together["documents"] == 2
    assert values(apart) == pytest.approx(values(together))
    sums = {}
    for row in rows:
        one = measure(student, teacher, [row], tokenizer, names=["cross_entropy"])
        key = int(documents[int(row["index"])])
        nats, count = sums.get(key, (0.0, 0))
        sums[key] = nats + values(one)["cross_entropy"] * one["tokens"], count + one["tokens"]
    expected = ratio(*zip(*sums.values(), strict=True))
    assert together["metrics"]["cross_entropy"]["error"] == pytest.approx(expected.error)
    one_alone = measure(student, teacher, rows.select([0]), tokenizer, names=["cross_entropy"])
    assert one_alone["metrics"]["cross_entropy"]["error"] is None


def test_packed_rows_know_their_documents(load):
    packed = load(packing="pack").documents["train"]
    np.testing.assert_array_equal(packed, load().documents["train"])
    assert len(np.unique(packed)) == 6


def test_only_tokens_with_a_label_count(student, teacher, rows, tokenizer):
    half = [{**row, "labels": np.where(np.arange(len(row["labels"])) % 2, row["labels"], -100)} for row in rows]
    batch = collator_for(half, tokenizer)(half)
    found = measure(student, teacher, half, tokenizer)
    assert found["tokens"] == len(kept_rows(batch["labels"])) < sum(len(row["labels"]) for row in half) / 1.9
    nothing = [{**row, "labels": np.full(len(row["labels"]), -100)} for row in rows]
    with pytest.raises(ValueError, match="none of their tokens has a label"):
        measure(student, teacher, nothing, tokenizer)
    with_some = [*nothing[:3], *half[:1], *nothing[3:]]
    bare = [{name: row[name] for name in ("input_ids", "labels")} for row in with_some]
    assert measure(student, teacher, bare, tokenizer, batch_size=2)["documents"] == 1


def test_reliability_counts_every_token_and_gives_the_error(measured):
    for side, name in (("student", "ece"), ("teacher", "teacher_ece")):
        diagram = measured["reliability"][side]
        assert sum(diagram["count"]) == measured["tokens"]
        gaps = [
            count * abs(sure - right)
            for sure, right, count in zip(diagram["confidence"], diagram["accuracy"], diagram["count"], strict=True)
            if count
        ]
        assert values(measured)[name] == pytest.approx(sum(gaps) / measured["tokens"])


def test_it_is_json_and_models_keep_their_mode(student, teacher, rows, tokenizer, measured):
    assert json.loads(json.dumps(measured, allow_nan=False)) == measured
    student.train()
    still = student.get_input_embeddings().eval()  # a part that is kept out of training
    try:
        again = measure(student, LocalTeacher(teacher), rows, tokenizer)
        assert student.training and not still.training
    finally:
        student.eval()
    same(again, measured)


def test_measures_are_chosen_by_name_and_a_student_may_be_measured_alone(student, teacher, rows, tokenizer):
    few = measure(student, teacher, rows, tokenizer, names=["cross_entropy", "acceptance_rate"])
    assert set(few["metrics"]) == {
        "cross_entropy", "perplexity", "bits_per_byte", "acceptance_rate", "block_efficiency"
    }  # fmt: skip
    alone = measure(student, None, rows, tokenizer)
    assert {"cross_entropy", "perplexity", "bits_per_byte", "student_entropy", "accuracy", "brier", "ece"} == set(
        alone["metrics"]
    )
    assert "bits_per_byte" not in measure(student, None, rows)["metrics"]
    with pytest.raises(ValueError, match="measure 'kl_to_teacher': with no teacher"):
        measure(student, None, rows, tokenizer, names=["kl_to_teacher"])
    with pytest.raises(ValueError, match="student: expected a language model, got Linear"):
        measure(torch.nn.Linear(2, 2), None, rows, tokenizer)


def test_what_is_derived_follows_from_the_means_that_are_there():
    assert derived({}) == {}
    found = derived({"cross_entropy": 2.0, "bytes": 4.0, "acceptance_rate": 0.5}, drafted=1)
    assert found == pytest.approx(
        {"perplexity": math.e**2, "bits_per_byte": 2 / math.log(2) / 4, "block_efficiency": 1.5}
    )
    assert derived({"cross_entropy": 1e6})["perplexity"] == math.inf
