"""Errors and differences of a job's figures come from single documents, and are those of textbook tests."""

import math
from typing import Any

import numpy as np
import pytest
from scipy import stats

from kdlm.jobs.significance import comparable, difference, documents, gap_closed


def result(metric: str, value: float, numbers: list[Any]) -> dict[str, Any]:
    """Return what the harness says of a task of so many documents."""
    figure = {"metric": metric, "filter": "none", "value": value, "error": None, "higher_is_better": True}
    samples = [{"doc_id": place, "filter": "none", metric: number} for place, number in enumerate(numbers)]
    return {"tasks": {"t": {"metrics": {metric: figure}}}, "samples": {"t": samples}, "groups": {}}


def scored(*models: list[float], metric: str = "acc") -> list[Any]:
    found = documents({str(k): result(metric, sum(m) / len(m), m) for k, m in enumerate(models)}, "t", metric)
    return list(found.values())


def test_a_mean_has_the_error_of_a_mean_and_its_difference_the_p_value_of_a_paired_t_test():
    random = np.random.default_rng(0)
    theirs = (random.random(80) < 0.4).astype(float)
    ours = np.where(random.random(80) < 0.2, 1.0, theirs)
    one, other = scored(ours.tolist(), theirs.tolist())
    assert one.estimate().value == pytest.approx(ours.mean())
    assert one.estimate().error == pytest.approx(stats.sem(ours))
    assert difference(one, other).p_value == pytest.approx(stats.ttest_rel(ours, theirs).pvalue)


def corpus(seed: int, shift: float = 0.0, n: int = 60) -> list[list[float]]:
    """Return log-likelihoods and lengths of texts that are hard and easy for every model alike."""
    random = np.random.default_rng(0)
    lengths = random.integers(20, 400, n)
    hard = random.normal(1.2, 0.3, n)
    own = np.random.default_rng(seed).normal(shift, 0.02, n)
    return [[-float(size * (h + o)), int(size)] for size, h, o in zip(lengths, hard, own, strict=True)]


def bits(rows: list[list[float]]) -> float:
    return -sum(row[0] for row in rows) / sum(row[1] for row in rows) / math.log(2)


def test_a_ratio_has_the_error_that_other_texts_of_the_kind_show():
    """The jackknife's error against the spread of the figure over texts that are drawn anew."""
    rows = np.array(corpus(1))
    random = np.random.default_rng(0)
    drawn = [bits(rows[random.integers(0, len(rows), len(rows))].tolist()) for _ in range(4000)]
    (one,) = documents(
        {"m": result("bits_per_byte", bits(rows.tolist()), rows.tolist())}, "t", "bits_per_byte"
    ).values()
    assert one.figure == "bits_per_byte"
    assert one.estimate().error == pytest.approx(np.std(drawn), rel=0.06)


def test_texts_in_common_tell_models_apart_whose_own_errors_overlap():
    a, b = corpus(1), corpus(2, shift=0.02)
    one, other = documents(
        {"a": result("bits_per_byte", bits(a), a), "b": result("bits_per_byte", bits(b), b)}, "t", "bits_per_byte"
    ).values()
    apart = difference(other, one)
    assert apart.value == pytest.approx(bits(b) - bits(a))
    assert apart.p_value < 1e-3 and apart.value < one.estimate().error


def test_models_that_are_alike_are_called_different_as_often_as_the_level_says():
    called = 0
    for seed in range(300):
        a, b = corpus(2 * seed), corpus(2 * seed + 1)
        one, other = documents(
            {"a": result("bits_per_byte", bits(a), a), "b": result("bits_per_byte", bits(b), b)}, "t", "bits_per_byte"
        ).values()
        called += difference(one, other).p_value < 0.05
    assert stats.binomtest(called, 300, 0.05).pvalue > 0.001


def test_the_gap_closed_is_0_at_the_baseline_1_at_the_teacher_and_has_an_error():
    random = np.random.default_rng(0)
    base, best = random.random(50), random.random(50) + 1
    baseline, student, teacher = scored(base.tolist(), ((base + best) / 2).tolist(), best.tolist())
    half = gap_closed(student, baseline, teacher)
    assert half.value == pytest.approx(0.5) and half.error == pytest.approx(0, abs=1e-9)
    assert gap_closed(baseline, baseline, teacher).value == 0
    assert gap_closed(teacher, baseline, teacher).value == 1
    noisy = scored(base.tolist(), (base + 0.5 + random.normal(0, 0.3, 50)).tolist(), best.tolist())
    assert gap_closed(noisy[1], noisy[0], noisy[2]).error > 0.01


def test_counts_of_hits_give_f1_precision_and_recall_even_where_they_are_equal_for_one_model():
    a, b = [[3, 1, 1], [2, 2, 2], [0, 1, 1]], [[3, 1, 0], [1, 3, 2], [1, 0, 4]]

    def f1(rows: list[list[int]]) -> float:
        hits, wrong, missed = map(sum, zip(*rows, strict=True))
        return 2 * hits / (2 * hits + wrong + missed)

    one, other = documents({"a": result("f1", f1(a), a), "b": result("f1", f1(b), b)}, "t", "f1").values()
    assert one.figure == other.figure == "f1" and comparable(one, other)
    assert difference(one, other).value == pytest.approx(f1(a) - f1(b))


def test_a_brier_score_is_told_by_its_documents():
    rows = [[0, [0.7, 0.2, 0.1]], [2, [0.3, 0.3, 0.4]], [1, [0.5, 0.4, 0.1]]]
    value = float(np.mean([sum((p - (k == right)) ** 2 for k, p in enumerate(ps)) for right, ps in rows]))
    (one,) = documents({"m": result("brier_score", value, rows)}, "t", "brier_score").values()
    assert one.figure == "mean" and one.estimate().value == pytest.approx(value)


@pytest.mark.parametrize("numbers", [["a", "b"], [[1, 2], [3]], [[1.0, "x"], [2.0, "y"]], [None, 1.0], []])
def test_what_single_documents_do_not_tell_is_left_to_the_harness(numbers):
    assert documents({"m": result("bleu", 12.3, numbers)}, "t", "bleu") == {"m": None}


def test_a_figure_that_the_documents_do_not_make_is_left_to_the_harness():
    assert documents({"m": result("odd", 0.9, [0.0, 1.0])}, "t", "odd") == {"m": None}


def test_other_documents_are_not_compared():
    one, other = scored([0.0, 1.0, 1.0], [1.0, 1.0, 0.0, 0.0])
    assert not comparable(one, other) and not comparable(one, None) and comparable(one, one)
