"""What a recipe names with `target` is looked for before anything is loaded or written."""

import sys
from pathlib import Path

import pytest

from kdlm.check import check
from kdlm.recipe import Recipe, load
from kdlm.train import train

RECIPE = """\
student: {name: sandbox, model: code-student-tiny}
teacher: {name: custom, target: "my_code:teacher"}
data: {train: [{path: "sandbox:code/train"}]}
method: {name: logit_kd}
losses: [{name: custom, target: "my_code:loss"}]
run_dir: run
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch) -> Recipe:
    (tmp_path / "my_code.py").write_text("def loss(student, teacher, labels): ...\n\n\ndef teacher(device): ...\n")
    (tmp_path / "r.yaml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_code", raising=False)
    return load("r.yaml")


def test_a_target_that_is_there_is_named(recipe):
    assert {"teacher: custom, my_code:teacher", "losses.0: custom, my_code:loss"} <= set(check(recipe))


def test_targets_that_are_not_there_are_all_reported_and_leave_no_folder(recipe, tmp_path):
    (tmp_path / "my_code.py").write_text("")
    with pytest.raises(ValueError) as caught:
        train(recipe)
    teacher, loss = str(caught.value).splitlines()
    assert teacher.startswith("teacher.target: cannot import 'my_code:teacher'")
    assert loss.startswith("losses.0.target: cannot import 'my_code:loss'")
    assert not (tmp_path / "run").exists()
