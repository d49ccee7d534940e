"""A wrong recipe: readable lines with their place, exit code 2, no traceback, no run folder."""

from pathlib import Path

import pytest
from tiny_folders import TEXT, tiny_folder

from kdlm import cli

RECIPE = """\
student: {name: pretrained, path: ./student}
teacher: {name: local, path: ./teacher}
data:
  train: [{path: train.jsonl}]
  max_length: 32
method: {name: logit_kd}
losses:
  - {name: forward_kl, temperature: 2}
training: {max_steps: 1, use_cpu: true}
run_dir: runs/wrong
"""

WRONG = {
    "typo": (
        "temperature: 2",
        "temprature: 2",
        "r.yaml:8: losses.0.temprature: unknown key, did you mean temperature?",
    ),
    "wrong type": (
        "max_steps: 1",
        "max_steps: ten",
        "r.yaml:9: training.max_steps: expected a whole number, got 'ten'",
    ),
    "missing file": ("train.jsonl", "trian.jsonl", "r.yaml:4: data.train.0: data source 'trian.jsonl': no such file"),
    "weights of rows that a method does not count by": (
        "train: [{path: train.jsonl}]\n  max_length: 32\nmethod: {name: logit_kd}",
        "train: [{path: train.jsonl, columns: {weight: text}}]\n  max_length: 32\n"
        "method: {name: hidden_kd, distance: rkd}",
        "r.yaml:4: data.train.0.columns.weight: hidden_kd counts all rows alike",
    ),
    "unknown loss": (
        "forward_kl",
        "foward_kl",
        "r.yaml:8: losses.0.name: unknown loss 'foward_kl', did you mean forward_kl?",
    ),
    "no teacher": ("teacher: {name: local, path: ./teacher}\n", "", "r.yaml:1: teacher: missing; logit_kd with"),
    "missing model": ("path: ./teacher", "path: ./techer", "r.yaml:2: teacher: ./techer: no such model folder"),
    "other vocabulary": (
        "./teacher",
        "./stranger",
        "r.yaml:2: teacher: student and teacher do not share a tokenizer: ",
    ),
    "empty data": ("train.jsonl", "empty.jsonl", "r.yaml:4: data.train.0: data source 'empty.jsonl': no rows in it"),
    "cyclic choice": (
        "{name: logit_kd}",
        "&m {name: *m}",
        "r.yaml:6: method.name: cyclic alias: the value contains itself",
    ),
    "yaml syntax": ("path: ./student}", "path: ./student", "r.yaml:2:8: yaml syntax: expected ',' or '}', but got ':'"),
    "missing key": ("run_dir: runs/wrong\n", "", "r.yaml:1: run_dir: missing"),
}
OVERRIDES = {
    "losses.0.temprature=3": "override 'losses.0.temprature=3': unknown key, did you mean temperature?",
    "losses.4.temperature=3": "override 'losses.4.temperature=3': losses has entries 0 to 0, not '4'",
    "training.max_steps": "override 'training.max_steps': expected key=value with a dotted key",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("wrong")
    for name, options in {"teacher": {}, "student": {}, "stranger": {"text": "zzz xxx qqq www"}}.items():
        tiny_folder(path / name, **options)
    (path / "train.jsonl").write_text(f'{{"text": "{TEXT}"}}\n' * 10)
    (path / "empty.jsonl").write_text("")
    return path


@pytest.mark.parametrize("verb", ["check", "train"])
@pytest.mark.parametrize("mistake", WRONG)
def test_a_wrong_recipe_is_one_line_with_its_place(folder, monkeypatch, capsys, verb, mistake):
    old, new, line = WRONG[mistake]
    monkeypatch.chdir(folder)
    Path("r.yaml").write_text(RECIPE.replace(old, new, 1))
    assert cli.main([verb, "r.yaml"]) == 2
    (said,) = capsys.readouterr().err.strip().splitlines()
    assert said.startswith(line)
    assert not Path("runs").exists()


@pytest.mark.parametrize("override", OVERRIDES)
def test_a_bad_override_is_one_line(folder, monkeypatch, capsys, override):
    monkeypatch.chdir(folder)
    Path("r.yaml").write_text(RECIPE)
    assert cli.main(["train", "r.yaml", override]) == 2
    (said,) = capsys.readouterr().err.strip().splitlines()
    assert said.startswith(OVERRIDES[override])
    assert not Path("runs").exists()


def test_a_missing_recipe_is_named(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    assert cli.main(["train", "recipe/r.yaml"]) == 2
    assert capsys.readouterr().err == "recipe/r.yaml: cannot read the recipe: No such file or directory\n"


def test_mistakes_of_several_parts_come_together(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    Path("r.yaml").write_text(RECIPE.replace("train.jsonl", "empty.jsonl").replace("./teacher", "./stranger"))
    assert cli.main(["check", "r.yaml"]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert [line.split(": ")[:2] for line in said] == [["r.yaml:2", "teacher"], ["r.yaml:4", "data.train.0"]]


def test_the_right_recipe_passes(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    Path("r.yaml").write_text(RECIPE)
    assert cli.main(["check", "r.yaml"]) == 0
    assert capsys.readouterr().err == ""
