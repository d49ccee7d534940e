"""Ensembles from a recipe: routed by the data's domains, learned, resumed, compared with the definition."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from kdlm import cli
from kdlm.recipe import load
from kdlm.sandbox import build
from kdlm.signal import domain_id
from kdlm.train import assemble, train

RECIPE = """
student: {name: sandbox, model: code-student-tiny}
teacher:
  name: ensemble
  members:
    - {name: sandbox, model: code-teacher-tiny}
    - {name: local, path: SECOND}
  weights: WEIGHTS
data:
  train:
    - {path: "sandbox:code/train", limit: 3, domain: code}
    - {path: prose.jsonl}
  max_length: 32
  eval_rows: 2
method: {name: logit_kd}
losses: [{name: forward_kl}]
training: {max_steps: 6, per_device_train_batch_size: 4, learning_rate: 0.01, logging_steps: 2, save_steps: 3,
           eval_strategy: steps, eval_steps: 6, use_cpu: true}
run_dir: run
"""
ROUTED = "{name: by_domain, table: {code: [1, 0], prose.jsonl: [0.2, 0.8]}}"


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch) -> Path:
    """A recipe whose second teacher is another model, with rows beyond the tokens in its head."""
    monkeypatch.chdir(tmp_path)
    source = build("code-teacher-tiny-padded")
    model = AutoModelForCausalLM.from_pretrained(source)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained("second")
    AutoTokenizer.from_pretrained(source).save_pretrained("second")
    Path("prose.jsonl").write_text(
        "".join(json.dumps({"text": f"the {i}th row is about prose"}) + "\n" for i in range(9))
    )
    Path("r.yaml").write_text(RECIPE.replace("SECOND", "./second").replace("WEIGHTS", ROUTED))
    return tmp_path / "r.yaml"


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "student" / "model.safetensors")


def assert_equal(one: Path, other: Path, **tolerance: float) -> None:
    ours, theirs = weights_of(one), weights_of(other)
    for name, weight in ours.items():
        torch.testing.assert_close(theirs[name], weight, **(tolerance or {"rtol": 0, "atol": 0}))


WAYS = {
    "routed": [],
    "log": ["teacher.space=log"],
    "confidence": ["teacher.weights={name: confidence}"],
    "learned": ["teacher.weights={name: learned, positions: 200}"],
    "learned log": ["teacher.weights={name: learned, positions: 200}", "teacher.space=log"],
}


@pytest.mark.parametrize("way", WAYS)
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(recipe: Path, way: str) -> None:
    assert cli.main(["check", str(recipe), *WAYS[way]]) == 0
    whole = train(load(recipe, [*WAYS[way], "run_dir=whole"]))
    results = json.loads((whole / "results.json").read_text())
    assert results["steps"] == 6 and results["eval_kl_to_teacher"] > 0
    assert "ensemble of sandbox:code-teacher-tiny, ./second" in (whole / "student" / "README.md").read_text()
    part = load(recipe, [*WAYS[way], "run_dir=part"])
    train(part)
    for name in ("checkpoint-6", "student"):
        shutil.rmtree(part.run_dir / name)
    train(part, resume=True)
    assert_equal(whole, part.run_dir)


def test_learned_weights_are_in_the_metrics_once_and_add_up_to_one(recipe: Path) -> None:
    part = load(recipe, WAYS["learned"])
    train(part)
    shutil.rmtree(part.run_dir / "checkpoint-6")
    shutil.rmtree(part.run_dir / "student")
    train(part, resume=True)
    lines = [json.loads(line) for line in (part.run_dir / "metrics.jsonl").read_text().splitlines()]
    fitted = [line for line in lines if "teacher_weight/0" in line]
    assert [line["step"] for line in fitted] == [0]
    assert fitted[0]["teacher_weight/0"] + fitted[0]["teacher_weight/1"] == pytest.approx(1)


@pytest.mark.parametrize("space", ["probability", "log"])
def test_all_weight_on_one_member_is_the_run_with_that_teacher(recipe: Path, space: str) -> None:
    sgd = ["training.optim=sgd", "training.learning_rate=1.0"]  # Adam would make much of the last digit of a gradient
    alone = train(load(recipe, ["teacher={name: sandbox, model: code-teacher-tiny}", "run_dir=alone", *sgd]))
    one = train(load(recipe, ["teacher.weights=[1, 0]", f"teacher.space={space}", "run_dir=one", *sgd]))
    assert_equal(alone, one, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("space", ["probability", "log"])
def test_where_the_members_live_is_inert(recipe: Path, space: str) -> None:
    both = [
        train(load(recipe, [f"teacher.space={space}", f"teacher.resident={r}", f"run_dir={r}"])) for r in ("all", "one")
    ]
    assert_equal(*both)


@pytest.mark.parametrize("packing", ["pack", "padding_free"])
def test_domains_reach_the_teacher_in_every_layout(recipe: Path, packing: str) -> None:
    trainer = assemble(load(recipe, [f"data.packing={packing}", "training.per_device_train_batch_size=2"])).trainer
    seen = set()
    for batch in trainer.get_train_dataloader():
        assert len(batch["domain"]) == len(batch["index"]) == (batch["position_ids"] == 0).sum()
        seen |= set(batch["domain"].tolist())
    assert seen == {domain_id("code"), domain_id("prose.jsonl")}
    trainer.train()


def test_streamed_rows_have_their_domains_too(recipe: Path) -> None:
    streamed = ["data.streaming=true", "data.eval_rows=null", "training.eval_strategy=no"]
    assert train(load(recipe, streamed)).exists()


def test_a_column_may_name_the_domain_of_each_row(recipe: Path) -> None:
    rows = [{"text": f"row {i} of its kind", "kind": "ab"[i % 2]} for i in range(8)]
    Path("mixed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = [
        "data.train=[{path: mixed.jsonl, columns: {domain: kind}}]",
        "teacher.weights={name: by_domain, table: {a: [1, 0], b: [0, 1]}}",
    ]
    assert cli.main(["check", str(recipe), *changes]) == 0
    assert train(load(recipe, changes)).exists()
    with pytest.raises(ValueError, match="rows of a domain that it does not name"):
        train(load(recipe, [changes[0], "teacher.weights={name: by_domain, table: {a: [1, 0]}}", "run_dir=other"]))


REFUSED = {
    "number of weights": (
        "WEIGHTS",
        "[1, 2, 3]",
        "r.yaml:3: teacher: weights: 3 weights for 2 members: give one to each",
    ),
    "number in the table": (
        "WEIGHTS",
        "{name: by_domain, table: {code: [1]}}",
        "r.yaml:3: teacher: weights.table.code: 1 weights for 2 members",
    ),
    "unknown rule": ("WEIGHTS", "{name: confident}", "r.yaml:8: teacher.weights.name: unknown weight 'confident'"),
    "unknown member": (
        "name: local, path",
        "name: locl, path",
        "r.yaml:7: teacher.members.1.name: unknown member 'locl'",
    ),
    "unknown domain": (
        "WEIGHTS",
        "{name: by_domain, table: {code: [1, 0], pose: [1, 0]}}",
        "r.yaml:8: teacher.weights.table: no source of the data has the domain 'pose'; there are 'code', 'prose.jsonl'",
    ),
    "domain without weights": (
        "WEIGHTS",
        "{name: by_domain, table: {code: [1, 0]}}",
        "r.yaml:8: teacher.weights.table: no weights for the domain 'prose.jsonl' of the data; name it, or set",
    ),
    "nothing to learn from": (
        "  eval_rows: 2\n",
        "",
        "r.yaml:8: teacher.weights: learned fits weights on evaluation rows, and there are none: set data.eval_rows",
    ),
    "nothing to average": (
        "name: local, path: SECOND",
        'name: custom, target: "nowhere:few"',
        "r.yaml:7: teacher.members.1.target: cannot import 'nowhere:few'",
    ),
    "a member that cannot move": (
        "name: local, path: SECOND}\n",
        "name: local, path: SECOND, device: cpu}\n  resident: one\n",
        "r.yaml:3: teacher: resident: one moves local models between CPU and device, which members.1 does not allow",
    ),
    "no kernel": (
        "{name: logit_kd}",
        "{name: logit_kd, impl: triton}",
        "r.yaml:15: method.impl: triton has no kernel for an average of teachers; use auto or torch",
    ),
    "a teacher's layers": (
        "{name: logit_kd}",
        "{name: hidden_kd}",
        "r.yaml:3: teacher: ensemble does not provide teacher.layers, which hidden_kd needs",
    ),
}


@pytest.mark.parametrize("mistake", REFUSED)
def test_what_cannot_work_is_one_line_with_its_place(recipe: Path, capsys, mistake: str) -> None:
    old, new, line = REFUSED[mistake]
    weights = "{name: learned}" if mistake == "nothing to learn from" else ROUTED
    text = RECIPE.replace(old, new, 1).replace("WEIGHTS", weights).replace("SECOND", "./second")
    recipe.write_text(text)
    assert cli.main(["check", "r.yaml"]) == 2
    assert capsys.readouterr().err.splitlines()[0].startswith(line)


def test_every_members_tokenizer_is_compared(recipe: Path, capsys) -> None:
    tokenizer = AutoTokenizer.from_pretrained("second")
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    vocab = state["model"]["vocab"]
    first, second = list(vocab)[300:302]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    Path("second/tokenizer.json").write_text(json.dumps(state))
    for verb in ("check", "train"):
        assert cli.main([verb, "r.yaml"]) == 2
        assert "r.yaml:7: teacher.members.1: student and teacher do not share a tokenizer" in capsys.readouterr().err
