"""The capacity gap's sweep: one student, several teachers, by the comparison that docs/pruning.md shows."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from small_comparison import RECIPE

from kdlm.cli import main
from kdlm.recipe import load
from kdlm.sandbox import build

PAGE = Path(__file__).parents[2] / "docs" / "pruning.md"
TEACHERS = {"1.7B": "code-student-tiny", "4B": "code-teacher-tiny"}
"""What stands for the page's teachers: one of random weights, and one that was trained."""


@pytest.mark.timeout(600)  # each run is a process of its own
def test_the_sweep_of_the_page_ranks_teachers_by_what_their_student_came_to(tmp_path: Path) -> None:
    (shown,) = re.findall(r"^```yaml\n(runs:.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    for name, model in TEACHERS.items():
        shown = shown.replace(f"Qwen/Qwen3-{name}", str(build(model)))
    sweep = yaml.safe_load(shown)
    assert {run["recipe"] for run in sweep["runs"].values()} == {"recipes/qwen3/forward_kl.yaml"}
    sweep["runs"] = {name: run | {"recipe": str(tmp_path / "recipe.yaml")} for name, run in sweep["runs"].items()}
    del sweep["runs"]["8B"]
    sweep |= {"overrides": ["training.max_steps=12"], "seeds": [0], "workers": 1, "output": str(tmp_path / "out")}
    tiny = RECIPE.replace("{name: sandbox, model: code-teacher-tiny}", "{name: local, path: nobody}")
    (tmp_path / "recipe.yaml").write_text(tiny)
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    assert main(["compare", str(tmp_path / "sweep.yaml")]) == 0
    found = json.loads((tmp_path / "out" / "results.json").read_text())["runs"]
    assert list(found) == ["4B", "1.7B"]
    for name, model in TEACHERS.items():
        teacher: Any = load(tmp_path / "out" / f"{name}-0" / "recipe.yaml").teacher
        assert teacher.path == str(build(model))
