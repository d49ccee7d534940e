"""Runs in TRL's trainer through `kdlm train`: their folder, their resumption, and what is refused by its key."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

pytest.importorskip("trl")

from kdlm.catalogue import entries
from kdlm.check import check
from kdlm.plan import device, predict
from kdlm.recipe import load
from kdlm.train import assemble, train

RECIPE = """
student: {name: sandbox, model: code-student-tiny}
teacher: {name: sandbox, model: code-teacher-tiny}
data: {train: [{path: "sandbox:arithmetic/train", limit: 12}], eval: [{path: "sandbox:arithmetic/eval", limit: 6}]}
method: {name: rlad}
rollouts: {sampling: {max_new_tokens: 6, samples_per_prompt: 4}, reuse: 2, eval_prompts: 3}
verifier: {name: regex, pattern: "[aeiou]"}
training:
  max_steps: 6
  per_device_train_batch_size: 2
  gradient_accumulation_steps: 2
  learning_rate: 0.01
  logging_steps: 1
  save_steps: 1
  eval_strategy: steps
  eval_steps: 3
  use_cpu: true
run_dir: run
"""
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)

    def write(*overrides: str, **changes: Any) -> Any:
        Path("recipe.yaml").write_text(yaml.safe_dump(yaml.safe_load(RECIPE) | changes))
        return load("recipe.yaml", overrides)

    return write


def logs(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_what_every_run_leaves_and_goes_on_bit_for_bit(recipe) -> None:
    run = train(recipe())
    ended, said = load_file(run / "student" / "model.safetensors"), logs(run)
    results = json.loads((run / "results.json").read_text())
    assert results["steps"] == 6 and 0 <= results["eval_rollout_reward"] <= 1
    assert "rlad" in (run / "student" / "README.md").read_text()
    named = {"loss", "rollout/reward", "rollout/length", "teacher/reverse_kl", "teacher/bounded", "memory_gib"}
    assert named <= said[0].keys() and not (run / "README.md").exists()
    assert any(log.get("reward_std", 0) > 0 for log in said)
    for step in (1, 4):
        train(recipe(), resume=str(run / f"checkpoint-{step}"))
        again = load_file(run / "student" / "model.safetensors")
        assert all((ended[name] == again[name]).all() for name in ended), step
        rewards = [[log["rollout/reward"] for log in one if "rollout/reward" in log] for one in (said, logs(run))]
        assert rewards[0] == rewards[1]


def test_the_student_is_asked_exactly_what_the_data_ask(recipe) -> None:
    run = assemble(recipe())
    asked: list[Any] = []
    judge = run.trainer.judges[0].judge
    run.trainer.judges[0].judge = lambda texts, references: asked.extend(texts) or judge(texts, references)
    rows = run.data.train.with_format(None)
    prompts = {tuple(i for i, y in zip(r["input_ids"], r["labels"], strict=True) if y == -100) for r in rows}
    assert {tuple(row["prompt"]) for row in run.trainer.train_dataset} == prompts
    run.trainer.model.train()
    batch = run.trainer._generate_and_score_completions([run.trainer.train_dataset[0]] * 4)
    shown = batch["prompt_ids"][0][batch["prompt_mask"][0].bool()].tolist()
    assert tuple(shown) in prompts and len(asked) == 4
    args = run.trainer.args
    assert (args.per_device_train_batch_size, args.steps_per_generation, args.num_iterations) == (8, 2, 2)
    assert (args.num_generations, args.max_completion_length, args.temperature, args.bf16) == (4, 6, 1.0, False)
    assert not args.gradient_checkpointing and len(run.trainer.eval_dataset) == 3
    run.trainer.close()


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ({"name": "rlad", "start_kl": 0.1}, {}),
        ({"name": "rlad", "start_kl": 0.1, "ratio": 0.2}, {"lora": {"rank": 2}}),
        ({"name": "grpo", "teacher_kl": 0.1, "loss_type": "grpo", "scale": "none"}, {"lora": {"rank": 2}}),
    ],
)
def test_with_a_kl_and_adapters_it_trains_and_resumes(recipe, method: Any, changes: Any) -> None:
    student = {"name": "sandbox", "model": "code-student-tiny", **changes}
    run = train(recipe("training.max_steps=4", method=method, student=student))
    ended = load_file(run / "student" / "model.safetensors")
    assert all("kl" in log for log in logs(run) if "loss" in log)
    train(recipe("training.max_steps=4", method=method, student=student), resume=str(run / "checkpoint-1"))
    again = load_file(run / "student" / "model.safetensors")
    assert all((ended[name] == again[name]).all() for name in ended)


def test_plain_grpo_takes_no_teacher(recipe) -> None:
    alone = recipe(method={"name": "grpo", "teacher_kl": 0}, teacher=None)
    assert "method: grpo; needs rollouts" in check(alone)
    with pytest.raises(ValueError, match="teacher: missing; grpo"):
        check(recipe(method={"name": "grpo"}, teacher=None))


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("rollouts.sampling.samples_per_prompt=1", "rollouts.sampling.samples_per_prompt: rewards are compared"),
        ("rollouts.sampling.temperature=0", "rollouts.sampling.temperature: at 0"),
        ("rollouts.sampling.teacher_share=0.2", "rollouts.sampling.teacher_share: TRL draws"),
        ("rollouts.asynchronous=true", "rollouts.asynchronous: TRL draws and trains by turns"),
        ("rollouts.show=3", "rollouts.show: no samples"),
        ("rollouts.engine={name: generate, batch_size: 8}", "rollouts.engine.batch_size: means nothing to TRL"),
        ("rollouts.engine={name: vllm, dtype: bfloat16}", "rollouts.engine.dtype: means nothing to TRL"),
        ("rollouts.environment={name: retry}", "rollouts.environment: a completion is one turn"),
        ("verifier=null", "verifier: missing; rlad learns from its score"),
        ("data.packing=padding_free", "data.packing: TRL pads"),
        ("evaluation={rows: 2}", "evaluation: in TRL's trainer"),
        ("guards={length: {stop: {below: 1}}}", "guards: nothing is watched"),
        ("teacher={name: self}", "teacher: self keeps copies"),
        ("losses=[{name: forward_kl}]", "losses: RLAD has its own"),
        ("teacher={name: openai, url: 'http://127.0.0.1:9', model: m, of: {name: sandbox, model: code-teacher-tiny}}",
         "method: rlad takes a signal of Dense, Hidden, LogProbs, Mixture; this teacher gives TopK"),
        ("training.auto_find_batch_size=true", "training: "),
    ],
)  # fmt: skip
def test_what_means_nothing_to_trl_is_refused_by_its_key(recipe, override: str, said: str) -> None:
    with pytest.raises(ValueError) as error:
        check(recipe(override))
    assert any(line.startswith(said) for line in str(error.value).splitlines()), str(error.value)


def test_vllm_is_trls_own(recipe) -> None:
    from kdlm.reward_settings import arguments

    inside = arguments(recipe("rollouts.engine={name: vllm, gpu_memory_utilization: 0.4, sleep: true}"))
    assert (inside.use_vllm, inside.vllm_mode, inside.vllm_gpu_memory_utilization) == (True, "colocate", 0.4)
    assert inside.vllm_enable_sleep_mode
    beside = arguments(recipe("rollouts.engine={name: vllm_server, url: 'http://127.0.0.1:9'}"))
    assert (beside.vllm_mode, beside.vllm_server_base_url) == ("server", "http://127.0.0.1:9")


def test_a_plan_says_that_it_does_not_cover_it_and_the_catalogue_lists_it(recipe) -> None:
    with pytest.raises(ValueError, match="method: plan covers kdlm's own trainers so far, and rlad runs in TRL's"):
        predict(recipe(), device("H100"))
    found = {entry.name: entry for entry in entries() if entry.kind == "method"}
    assert found["rlad"].paper == "arXiv 2602.22495" and found["grpo"].what.startswith("Policy gradient of rewards")
