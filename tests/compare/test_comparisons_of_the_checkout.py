"""The comparisons of the checkout: each can be run, and the leaderboard has every method."""

import sys
from importlib import import_module
from pathlib import Path

import pytest

from kdlm.compare import Comparison
from kdlm.compare.planned import planned, seeded
from kdlm.compare.search import problems
from kdlm.section_loader import load_section

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "eval" / "comparisons").glob("*.yaml"))
GROUPS = sorted((ROOT / "eval" / "leaderboard").glob("*.yaml"))


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


@pytest.fixture
def leaderboard():
    yield import_module("leaderboard")
    sys.modules.pop("leaderboard")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_comparison_of_the_checkout_can_be_run(path: Path) -> None:
    compared = load_section(Comparison, path)
    assert planned(compared) and not list(problems(compared))
    assert path.read_text().splitlines()[1].startswith("# ")


def test_every_method_and_loss_is_on_the_leaderboard_or_left_out_for_a_reason(leaderboard) -> None:
    groups = {path.stem: load_section(Comparison, path) for path in GROUPS}
    assert set(leaderboard.GROUPS) == set(groups)
    runs = {
        group: [seeded(name, run, compared)[0] for name, run in compared.runs.items()]
        for group, compared in groups.items()
    }
    assert leaderboard.missing(runs) == []
    del runs["tokenizers"]
    assert "gold: in no group of eval/leaderboard, nor in LEFT_OUT" in leaderboard.missing(runs)


def test_the_runs_of_a_group_have_one_budget_and_the_same_eyes(leaderboard) -> None:
    for path in GROUPS:
        compared = load_section(Comparison, path)
        runs = [seeded(name, run, compared)[0].recipe for name, run in compared.runs.items()]
        taught = [run for run in runs if run.training.max_steps != 1]  # a run of one step is a start to compare with
        assert len({run.training.max_steps for run in taught}) == 1, path
        assert len({run.data.model_dump_json(include={"eval"}) for run in runs}) == 1, path
        assert compared.baseline in compared.runs and compared.seeds == [0, 1, 2], path
