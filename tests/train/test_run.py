"""A run from its recipe to the folder it leaves, through the command line's own functions."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from kdlm.cli import main
from kdlm.recipe import load
from kdlm.sandbox import build
from kdlm.train import assemble, train

RECIPE = """
student: {name: sandbox, model: code-student-tiny}
teacher: {name: sandbox, model: code-teacher-tiny}
data: {train: [{path: "sandbox:code/train", limit: 4}], max_length: 32, eval_rows: 1}
method: {name: logit_kd}
losses: [{name: forward_kl}]
training: {max_steps: 6, per_device_train_batch_size: 4, learning_rate: 0.01, logging_steps: 2, save_steps: 3,
           eval_strategy: steps, eval_steps: 6, use_cpu: true}
run_dir: {RUN}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.replace("{RUN}", str(tmp_path / "run")))
    return path


def run(recipe: Path, *overrides: str) -> Path:
    return train(load(recipe, overrides))


def logits(folder: Path) -> torch.Tensor:
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder)(ids).logits


def test_the_run_folder_says_what_was_run_and_what_came_out(recipe: Path) -> None:
    folder = run(recipe)
    assert load(folder / "recipe.yaml") == load(recipe)
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["packages"]["torch"] == torch.__version__.split("+")[0] or environment["packages"]["torch"]
    data = json.loads((folder / "data.json").read_text())
    assert set(data["fingerprints"]) == {"train", "eval"} and data["train"][0]["kept"] > 0
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "forward_kl" in line] == [2, 4, 6]
    results = json.loads((folder / "results.json").read_text())
    assert results["steps"] == 6 and 0 < results["eval_kl_to_teacher"] < 10
    card = (folder / "student" / "README.md").read_text()
    for named in (
        "sandbox:code-teacher-tiny",
        "forward_kl",
        "sandbox:code/train",
        f"{results['eval_kl_to_teacher']:.4f}",
    ):
        assert named in card
    assert AutoTokenizer.from_pretrained(folder / "student").decode([5])
    assert logits(folder / "student").shape[-1] == 512


def test_training_brings_the_student_closer_to_the_teacher(recipe: Path) -> None:
    folder = run(recipe, "training.max_steps=60", "training.eval_steps=20")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    curve = [line["eval_kl_to_teacher"] for line in lines if "eval_kl_to_teacher" in line]
    assert curve[-1] < curve[0]


def test_a_teacher_with_a_padded_head_gives_the_run_of_the_unpadded_one(recipe: Path, tmp_path: Path) -> None:
    plain = run(recipe, f"run_dir={tmp_path / 'plain'}")
    padded = run(recipe, f"run_dir={tmp_path / 'padded'}", "teacher.model=code-teacher-tiny-padded")
    ours, theirs = (load_file(folder / "student" / "model.safetensors") for folder in (plain, padded))
    for name, weight in ours.items():
        torch.testing.assert_close(theirs[name], weight, rtol=1e-4, atol=1e-6)


def test_a_student_with_a_padded_head_learns_as_the_unpadded_one(recipe: Path, tmp_path: Path) -> None:
    """2,048 against 2,176 in small: rows that no token has get neither gradient nor probability in the divergence."""
    source, wide = build("code-student-tiny"), tmp_path / "wide"
    model = AutoModelForCausalLM.from_pretrained(source)
    before = model.get_input_embeddings().weight.detach().clone()
    model.resize_token_embeddings(before.shape[0] + 64)
    model.save_pretrained(wide)
    AutoTokenizer.from_pretrained(source).save_pretrained(wide)
    plain = run(recipe, f"run_dir={tmp_path / 'plain'}", f"student={{name: pretrained, path: {source}}}")
    padded = run(recipe, f"run_dir={tmp_path / 'padded'}", f"student={{name: pretrained, path: {wide}}}")
    ours, theirs = (load_file(folder / "student" / "model.safetensors") for folder in (plain, padded))
    for name, weight in ours.items():
        torch.testing.assert_close(theirs[name][: len(weight)], weight, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dora", ["false", "true"])
def test_a_lora_student_is_exported_merged(recipe: Path, dora: str) -> None:
    folder = run(recipe, f"student.lora={{rank: 4, dora: {dora}}}")
    assert not list((folder / "student").glob("adapter*"))
    start, end = (
        load_file(build("code-student-tiny") / "model.safetensors"),
        load_file(folder / "student/model.safetensors"),
    )
    assert start.keys() == end.keys()
    changed = {name for name in start if not torch.equal(start[name], end[name])}
    assert changed and all("proj" in name for name in changed)
    assert (folder / "checkpoint-3" / "adapter_model.safetensors").exists()


def test_a_lora_student_can_be_exported_as_its_adapter(recipe: Path) -> None:
    from peft import PeftModel

    folder = run(recipe, "student.lora={rank: 4, export: adapter}")
    base = AutoModelForCausalLM.from_pretrained(build("code-student-tiny"))
    opened = PeftModel.from_pretrained(base, folder / "student")
    assert opened.peft_config["default"].r == 4


@pytest.mark.parametrize(
    "student",
    [
        "{name: fresh, config_from: SOURCE, sizes: {num_hidden_layers: 2}, seed: 3}",
        "{name: pruned, source: {name: sandbox, model: code-teacher-tiny}, layers: 1, width: {intermediate_size: 64}}",
    ],
)
def test_a_student_can_be_fresh_or_pruned_from_the_teacher(recipe: Path, student: str) -> None:
    folder = run(recipe, f"student={student.replace('SOURCE', str(build('code-student-tiny')))}")
    assert logits(folder / "student").isfinite().all()


@pytest.mark.parametrize("packing", ["pack", "padding_free"])
def test_packed_and_padding_free_runs_train(recipe: Path, packing: str) -> None:
    folder = run(recipe, f"data.packing={packing}", "training.per_device_train_batch_size=2")
    assert json.loads((folder / "results.json").read_text())["eval_kl_to_teacher"] > 0


def test_length_groups_checkpointing_and_streaming_train(recipe: Path, tmp_path: Path) -> None:
    grouped = ["training.train_sampling_strategy=group_by_length", "training.activation_checkpointing=true"]
    assert run(recipe, f"run_dir={tmp_path / 'grouped'}", *grouped).exists()
    streamed = ["data.streaming=true", "data.eval_rows=null", "training.eval_strategy=no"]
    assert run(recipe, f"run_dir={tmp_path / 'streamed'}", *streamed).exists()


def test_gradient_checkpointing_changes_memory_and_not_the_weights(recipe: Path, tmp_path: Path) -> None:
    plain = run(recipe, f"run_dir={tmp_path / 'plain'}")
    lean = run(recipe, f"run_dir={tmp_path / 'lean'}", "training.activation_checkpointing=true")
    ours, theirs = (load_file(folder / "student" / "model.safetensors") for folder in (plain, lean))
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-6) for name in ours)


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_a_quantised_teacher_teaches_nearly_the_same(recipe: Path, bits: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    assembled = assemble(load(recipe, [f"teacher.quantization={bits}"]))
    whole = assemble(load(recipe))
    kl = (
        assembled.trainer.evaluate()["eval_teacher_cross_entropy"]
        - whole.trainer.evaluate()["eval_teacher_cross_entropy"]
    )
    assert 0 < abs(kl) < 0.1


def test_the_newest_checkpoint_of_another_recipe_is_not_resumed(recipe: Path, capsys) -> None:
    run(recipe)
    assert main(["train", str(recipe)]) == 2
    assert "already holds a run; go on with --resume" in capsys.readouterr().err
    assert main(["train", str(recipe), "--resume", "losses.0.temperature=2"]) == 2
    assert "losses.0.temperature: 2.0 differs from 1.0" in capsys.readouterr().err


def test_the_best_checkpoint_is_the_one_that_is_exported(recipe: Path) -> None:
    folder = run(
        recipe, "training.load_best_model_at_end=true", "training.metric_for_best_model=eval_kl_to_teacher",
        "training.greater_is_better=false", "training.learning_rate=3.0", "training.save_steps=2",
        "training.eval_steps=2",
    )  # fmt: skip
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    scores = {line["step"]: line["eval_kl_to_teacher"] for line in lines if "eval_kl_to_teacher" in line}
    best = min(scores, key=scores.get)
    results = json.loads((folder / "results.json").read_text())
    assert results["eval_kl_to_teacher"] == pytest.approx(scores[best], rel=1e-5)


def test_a_bf16_student_file_is_trained_in_float32(recipe: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(build("code-student-tiny"), dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "half")
    AutoTokenizer.from_pretrained(build("code-student-tiny")).save_pretrained(tmp_path / "half")
    folder = run(recipe, f"student={{name: pretrained, path: {tmp_path / 'half'}}}")
    assert {w.dtype for w in load_file(folder / "student" / "model.safetensors").values()} == {torch.float32}


def test_bf16_trains_float32_weights_under_autocast(recipe: Path, tmp_path: Path) -> None:
    whole = run(recipe, f"run_dir={tmp_path / 'fp32'}")
    half = run(recipe, f"run_dir={tmp_path / 'bf16'}", "training.bf16=true")
    ours, theirs = (load_file(folder / "student" / "model.safetensors") for folder in (whole, half))
    assert {weight.dtype for weight in theirs.values()} == {torch.float32}
    assert any(not torch.equal(ours[name], theirs[name]) for name in ours)
    results = [json.loads((folder / "results.json").read_text())["eval_kl_to_teacher"] for folder in (whole, half)]
    assert results[1] == pytest.approx(results[0], rel=0.05)


def test_metrics_reach_the_trackers_of_the_trainer(recipe: Path) -> None:
    folder = run(recipe, "training.report_to=tensorboard")
    events = list(folder.rglob("events.out.tfevents.*"))
    assert events and b"forward_kl" in events[0].read_bytes()


def test_a_killed_lora_run_goes_on_where_it_was(recipe: Path, tmp_path: Path) -> None:
    lora = "student.lora={rank: 4}"
    whole = run(recipe, f"run_dir={tmp_path / 'whole'}", lora)
    part = load(recipe, [f"run_dir={tmp_path / 'part'}", lora])
    train(load(recipe, [f"run_dir={tmp_path / 'part'}", lora]))
    for name in ("checkpoint-6", "student"):  # as if it had been killed after its first checkpoint
        shutil.rmtree(part.run_dir / name)
    train(part, resume=True)
    ours, theirs = (load_file(folder / "student" / "model.safetensors") for folder in (whole, part.run_dir))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
