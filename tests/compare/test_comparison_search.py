"""The search: what it proposes depends on what came of it before, not on where it was stopped."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console
from small_comparison import comparison

from kdlm.compare import compare
from kdlm.compare.search import searched
from kdlm.recipe import load

SPACE = {
    "training.learning_rate": {"low": 1e-4, "high": 1.0, "log": True},
    "losses": {"choices": [[{"name": "forward_kl"}], [{"name": "reverse_kl"}]]},
    "training.per_device_train_batch_size": {"low": 1, "high": 8, "whole": True},
}


class Stopped(Exception):
    """What stands for a kill."""


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Runs that only write a figure: best at a rate of 0.01 and forward KL; they stop where they are told to."""
    told = SimpleNamespace(after=math.inf, made=[])

    def made(runs, comparison, console):
        for run in runs:
            if len(told.made) >= told.after:
                told.after = math.inf
                raise Stopped
            if run.finished:
                continue
            told.made.append(run.folder)
            figure = abs(math.log10(run.recipe.training.learning_rate) + 2) + (
                run.recipe.losses[0].name != "forward_kl"
            )
            (run.folder / "student").mkdir(parents=True)
            (run.folder / "results.json").write_text(json.dumps({"eval_cross_entropy": figure}))
        return {}

    monkeypatch.setattr("kdlm.compare.search.made", made)
    monkeypatch.setattr("kdlm.compare.comparing.made", made)
    return told


def asked(folder: Path, trials: int = 16, **changes: object):
    folder.mkdir(exist_ok=True)
    search = {"recipe": str(folder / "recipe.yaml"), "space": SPACE, "trials": trials, **changes}
    return comparison(folder, runs={}, search=search, workers=2)


def test_a_search_finds_the_better_half_and_writes_a_recipe_that_trains(tmp_path: Path, quick) -> None:
    rows = compare(asked(tmp_path))
    assert [row.name for row in rows] == ["best"] and len(quick.made) == 17
    best = load(tmp_path / "out" / "best.yaml")
    assert best.losses[0].name == "forward_kl" and 10**-2.5 < best.training.learning_rate < 10**-1.5
    data = json.loads((tmp_path / "out" / "results.json").read_text())
    figures = [trial["figure"] for trial in data["search"]]
    assert figures == sorted(figures) and len(figures) == 16
    assert "| trial | cross-entropy | training.learning_rate | losses |" in (tmp_path / "out/results.md").read_text()


def test_a_stopped_search_ends_with_the_trials_of_an_unbroken_one(tmp_path: Path, quick) -> None:
    whole = searched(asked(tmp_path / "whole"), Console(quiet=True))[1]
    quick.made.clear()
    for after in (0, 3, 8):
        quick.after = after
        with pytest.raises(Stopped):
            searched(asked(tmp_path / "stopped"), Console(quiet=True))
    assert searched(asked(tmp_path / "stopped"), Console(quiet=True))[1] == whole
    assert len(quick.made) == 16, "a trial was made twice"


def test_the_study_of_another_search_is_refused(tmp_path: Path, quick) -> None:
    searched(asked(tmp_path, trials=2), Console(quiet=True))
    searched(asked(tmp_path, trials=3), Console(quiet=True))  # more trials are the same search
    with pytest.raises(ValueError, match="of another search"):
        searched(asked(tmp_path, seed=1), Console(quiet=True))


def test_every_choice_and_end_of_the_space_is_looked_at_first(tmp_path: Path, quick) -> None:
    space = {
        "losses.0.temprature": {"low": 1, "high": 2},
        "method.name": {"choices": ["taid", "tiad"]},
    }
    with pytest.raises(ValueError, match="unknown key") as caught:
        compare(asked(tmp_path, space=space))
    assert "did you mean temperature?" in str(caught.value) and "unknown method 'tiad'" in str(caught.value)
    assert not quick.made


def test_the_recipe_may_be_a_choice(tmp_path: Path, quick) -> None:
    space = {"recipe": {"choices": [str(tmp_path / f"{name}.yaml") for name in ("other", "recipe")]}}
    compared = asked(tmp_path, trials=6, space=space)
    (tmp_path / "other.yaml").write_text((tmp_path / "recipe.yaml").read_text().replace("forward_kl", "reverse_kl"))
    compare(compared)
    assert load(tmp_path / "out" / "best.yaml").losses[0].name == "forward_kl"
