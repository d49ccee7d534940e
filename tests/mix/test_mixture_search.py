"""`kdlm mix`: components, merges that stand in for mixtures, and the recipe that comes out."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from kdlm.check import check
from kdlm.cli import main
from kdlm.mix import Mixture
from kdlm.mix.components import Proxies, average, components, names, whole
from kdlm.recipe import load
from kdlm.section_loader import load_section

ROOT = Path(__file__).parents[2]
RECIPE = """
student: {name: sandbox, model: code-teacher-tiny}
data:
  train:
    - {path: "sandbox:code/train", limit: 2, domain: code}
    - {path: "sandbox:arithmetic/train", limit: 40}
    - {path: "sandbox:strings/train", limit: 40}
  eval: [{path: "sandbox:arithmetic/eval", limit: 4}]
  max_length: 32
method: {name: sequence_kd}
training: {max_steps: 3, per_device_train_batch_size: 2, learning_rate: 0.01, logging_steps: 1, use_cpu: true,
           save_strategy: "no"}
run_dir: runs/never
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    given = {"recipe": str(tmp_path / "recipe.yaml"), "evaluations": 8, "workers": 1, "threads": 1}
    given |= {"candidates": {"pool": 500, "average": 50}, "output": str(tmp_path / "out")}
    (tmp_path / "mixture.yaml").write_text(yaml.safe_dump(given))
    return tmp_path / "mixture.yaml"


def test_weights_and_a_recipe_come_out_and_the_command_can_be_given_again(file: Path, tmp_path: Path, capsys) -> None:
    assert main(["mix", str(file)]) == 0
    about = json.loads((tmp_path / "out" / "mixture.json").read_text())
    weights = about["weights"]
    assert list(weights) == ["code", "sandbox-arithmetic-train", "sandbox-strings-train"]
    assert sum(weights.values()) == pytest.approx(1) and len(about["judged"]) == 8 + 4 + 2 + 1
    assert about["eval_cross_entropy"] < np.median([one["eval_cross_entropy"] for one in about["judged"]])
    recipe = load(tmp_path / "out" / "recipe.yaml")
    assert [source.weight for source in recipe.data.train] == pytest.approx(list(weights.values()))
    assert check(recipe) and recipe.run_dir == tmp_path / "out" / "run"
    lines = (tmp_path / "out" / "scores.jsonl").read_text().splitlines()
    (tmp_path / "out" / "scores.jsonl").write_text("\n".join([*lines[:5], lines[5][:20]]) + "\n")  # as a kill leaves it
    assert main(["mix", str(file)]) == 0
    assert json.loads((tmp_path / "out" / "mixture.json").read_text()) == about
    assert "3 of them finished before" in capsys.readouterr().out


def test_components_that_are_made_anew_are_judged_anew(file: Path, tmp_path: Path, monkeypatch) -> None:
    from rich.console import Console

    mixture, scores = load_section(Mixture, file), tmp_path / "out" / "scores.jsonl"
    scores.parent.mkdir()
    scores.write_text('{"weights": [1.0, 0.0, 0.0], "eval_cross_entropy": 0.1}\n')
    monkeypatch.setattr("kdlm.mix.components.made", lambda *_: {})
    components(mixture, whole(mixture), Console(quiet=True))
    assert not scores.exists(), "somebody removed a component: what was judged is of another one"


def test_all_weight_on_one_source_is_the_model_of_that_source(file: Path) -> None:
    mixture = load_section(Mixture, file)
    recipe = whole(mixture)
    from rich.console import Console

    runs = components(mixture, recipe, Console(quiet=True))
    proxies = Proxies(mixture, recipe, [run.folder / "student" for run in runs])
    for place, run in enumerate(runs):
        score = proxies.score(np.eye(3)[place])
        assert score == json.loads((run.folder / "results.json").read_text())["eval_cross_entropy"]
        merged, trained = proxies.trainer.student.state_dict(), load_file(run.folder / "student" / "model.safetensors")
        assert all(torch.equal(merged[name], value) for name, value in trained.items())
    proxies.states.reverse()
    mixed = proxies.score(np.array([0.5, 0.3, 0.2]))
    proxies.states.reverse()
    assert proxies.score(np.array([0.2, 0.3, 0.5])) == pytest.approx(mixed, abs=1e-6)
    begun = {tuple(load(run.path, run.overrides).student.model_dump().items()) for run in runs}
    assert len(begun) == 1, "components begin as one student"


def test_an_average_is_linear_and_keeps_what_is_no_weight() -> None:
    tensors = [torch.randn(3, 4, generator=torch.Generator().manual_seed(n)) for n in range(3)]
    assert torch.equal(average(tensors, [0, 1, 0]), tensors[1])
    expected = 0.2 * tensors[0] + 0.3 * tensors[1] + 0.5 * tensors[2]
    torch.testing.assert_close(average(tensors, [0.2, 0.3, 0.5]), expected)
    counts = [torch.tensor([1, 2]), torch.tensor([1, 2])]
    assert average(counts, [0.5, 0.5]) is counts[0]
    with pytest.raises(ValueError, match="not of one beginning"):
        average([counts[0], counts[0] + 1], [0.5, 0.5])
    half = [tensor.bfloat16() for tensor in tensors]
    assert average(half, [0.2, 0.3, 0.5]).dtype == torch.bfloat16


def test_sources_of_one_name_get_folders_of_their_own(file: Path) -> None:
    sources = '[{path: "sandbox:code/train", domain: x}, {path: "sandbox:strings/train", domain: x}]'
    mixture = load_section(Mixture, file, [f"overrides=['data.train={sources}']"])
    assert names(whole(mixture)) == ["x", "x-1"]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ('data.train=[{path: "sandbox:code/train"}]', "several training sources"),
        ("data.eval=", "no rows to judge by"),
        ("student.lora={}", "student.lora"),
    ],
)
def test_what_cannot_be_mixed_is_refused_before_anything_is_run(file: Path, tmp_path: Path, override, said, capsys):
    assert main(["mix", str(file), f"overrides={json.dumps([override])}"]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("path", sorted((ROOT / "eval" / "mixtures").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_mixture_of_the_checkout_can_be_run(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert len(names(whole(load_section(Mixture, path)))) > 1
