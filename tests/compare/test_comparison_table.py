"""The table's figures are those of scipy, its order is by the first metric, and what is missing is said."""

import math
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from rich.console import Console

from kdlm.compare import Comparison, ranked
from kdlm.compare.sections import Candidate
from kdlm.compare.table import Row, as_data, markdown, printed


def rows(rng: np.random.Generator, names: list[str], seeds: int = 4) -> list[Row]:
    seconds = {seed: {"wall": 2.0 + seed, "cpu": 1.0} for seed in range(seeds)}
    return [
        Row(name, {seed: {"loss": float(rng.normal()), "right": float(rng.random())} for seed in range(seeds)}, seconds)
        for name in names
    ]


def of(names: list[str], **changes: object) -> Comparison:
    runs = {name: Candidate(recipe=Path("r.yaml")) for name in names}
    metrics = {"loss": "lower", "right": "higher"}
    return Comparison.model_validate({"runs": runs, "metrics": metrics, "baseline": names[0], "output": "o", **changes})


def test_means_intervals_and_paired_tests_are_those_of_scipy() -> None:
    names = ["plain", "a", "b"]
    table = rows(np.random.default_rng(0), names)
    data = as_data(table, of(names))["runs"]
    for row in table:
        values = np.array([figures["loss"] for figures in row.figures.values()])
        low, high = scipy.stats.t.interval(0.95, 3, values.mean(), scipy.stats.sem(values))
        said = data[row.name]["metrics"]["loss"]
        assert (said["value"], said["low"], said["high"]) == pytest.approx((values.mean(), low, high))
        if row.name == "plain":
            assert "against_baseline" not in data["plain"]
            continue
        base = [figures["loss"] for figures in table[0].figures.values()]
        said = data[row.name]["against_baseline"]["loss"]
        assert said["difference"] == pytest.approx(values.mean() - np.mean(base))
        assert said["p_value"] == pytest.approx(scipy.stats.ttest_rel(values, base).pvalue)


@pytest.mark.parametrize(("way", "order"), [("lower", ["b", "a", "c"]), ("higher", ["c", "a", "b"])])
def test_the_best_by_the_first_metric_is_first_and_a_run_without_a_figure_last(way: str, order: list[str]) -> None:
    table = [Row("none", failed={0: "no"}), *(Row(n, {0: {"loss": v}}) for n, v in (("a", 2), ("c", 3), ("b", 1)))]
    compared = of(["none", "a", "b", "c"], metrics={"loss": way})
    assert [row.name for row in ranked(table, compared)] == [*order, "none"]
    assert [row.name for row in ranked(table[::-1], compared)] == [*order, "none"]


def test_differences_are_over_the_seeds_that_both_have() -> None:
    base, other = Row("base", {0: {"loss": 1.0}, 2: {"loss": 5.0}}), Row("b", {2: {"loss": 4.0}, 1: {"loss": 100.0}})
    beyond = other.beyond(base, "loss")
    assert beyond.value == -1.0 and math.isnan(beyond.error)


def test_what_no_run_has_is_null_in_the_data_and_a_dash_in_the_table() -> None:
    table = [Row("a", {0: {"loss": 1.0}}, {0: {"wall": math.nan, "cpu": math.nan}}), Row("b", failed={0: "boom\nbang"})]
    compared = of(["a", "b"], seeds=[0])
    data = as_data(table, compared)["runs"]
    assert data["a"]["metrics"]["loss"] == {"value": 1.0, "error": None, "low": None, "high": None}
    assert data["a"]["metrics"]["right"]["value"] is None and data["a"]["seconds"] == {"wall": None, "cpu": None}
    assert data["b"]["seeds"]["0"] == {"failed": "boom\nbang"}
    text = markdown(table, compared)
    assert "| 1 | a | 1 | - |" in text and "b, seed 0, failed:\n\n```\nboom\nbang\n```" in text


def test_the_terminal_shows_what_the_markdown_has() -> None:
    table, compared = rows(np.random.default_rng(1), ["plain", "a"]), of(["plain", "a"])
    with (console := Console(width=200)).capture() as shown:
        console.print(printed(table, compared))
    line = next(line for line in markdown(table, compared).splitlines() if "| a |" in line)
    for cell in filter(None, line.strip("| ").split(" | ")):
        assert cell in shown.get()
