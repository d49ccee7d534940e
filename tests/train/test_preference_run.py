"""DPO and SimPO through `kdlm train`: TRL's own runs bit for bit, their resumption, and what is refused by its key."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset
from loopback import source
from safetensors.torch import load_file

trl = pytest.importorskip("trl")

from kdlm.catalogue import entries  # noqa: E402
from kdlm.check import check  # noqa: E402
from kdlm.plan import device, predict  # noqa: E402
from kdlm.preference_settings import arguments  # noqa: E402
from kdlm.preference_trainer import CPOTrainer  # noqa: E402
from kdlm.recipe import load  # noqa: E402
from kdlm.train import assemble, train  # noqa: E402

RECIPE = """
student: {name: sandbox, model: code-student-tiny}
data: {train: [{path: pairs.jsonl}], eval: [{path: pairs.jsonl, limit: 2}], max_length: 64}
method: {name: dpo}
training:
  max_steps: 5
  per_device_train_batch_size: 2
  learning_rate: 0.003
  logging_steps: 1
  save_steps: 1
  use_cpu: true
run_dir: run
"""
PAIRS = [  # no token merges over the end of a prompt: there TRL would cut the prompt, and kdlm would not
    {"prompt": f"x{n} =", "chosen": f" a + b + {n}", "rejected": " None" + " or None" * n} for n in range(6)
]
DPO = {"name": "dpo"}
SIMPO = {"name": "simpo"}
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    Path("pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))

    def write(*overrides: str, **changes: Any) -> Any:
        Path("recipe.yaml").write_text(yaml.safe_dump(yaml.safe_load(RECIPE) | changes))
        return load("recipe.yaml", overrides)

    return write


def student_of(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "student" / "model.safetensors")


def bare(recipe: Any, **options: Any) -> dict[str, torch.Tensor]:
    """A run of TRL's trainer as anyone would write it, on the text of the pairs."""
    args = arguments(recipe, output_dir="bare", seed=recipe.seed, disable_tqdm=True)
    args.save_strategy, args.report_to = "no", []
    built = source("code-student-tiny")
    kind, reference = (trl.DPOTrainer, {"ref_model": built.load()}) if recipe.method.name == "dpo" else (CPOTrainer, {})
    rows = Dataset.from_list(PAIRS)
    given = {"train_dataset": rows, "processing_class": built.tokenizer(), **reference, **options}
    trainer = kind(built.load(), args=args, **given)
    trainer.train()
    return dict(trainer.model.named_parameters())


@pytest.mark.parametrize(
    "method", [DPO, {**DPO, "chosen_ce": 0.5, "beta": 0.4}, SIMPO, {**SIMPO, "chosen_ce": 0.2, "gamma": 0.3}]
)
def test_a_recipe_runs_as_trl_does_bit_for_bit(recipe, method: Any) -> None:
    run = train(recipe(method=method))
    start, ours = dict(source("code-student-tiny").load().named_parameters()), student_of(run)
    assert max((ours[name] - start[name]).abs().max() for name in ours if name in start) > 1e-3
    for name, weight in bare(recipe(method=method)).items():
        if name in ours:
            assert torch.equal(ours[name], weight), name


def test_a_teacher_as_the_reference_is_trls_reference_model(recipe) -> None:
    made = recipe(method={**DPO, "reference": "teacher"}, teacher={"name": "sandbox", "model": "code-teacher-tiny"})
    ours = student_of(train(made))
    theirs = bare(made, ref_model=source("code-teacher-tiny").load())
    assert all(torch.equal(ours[name], weight) for name, weight in theirs.items() if name in ours)


def first_loss(recipe: Any) -> tuple[float, dict[str, float]]:
    run = assemble(recipe)
    batch = run.trainer.data_collator([run.data.train[n] for n in range(4)])
    run.trainer.model.train()
    loss = run.trainer.compute_loss(run.trainer.model, batch).item()
    noted = getattr(run.trainer, "_metrics", None) or run.trainer._stored_metrics
    return loss, {name: values[-1] for name, values in noted["train"].items()}


def test_a_student_that_is_its_reference_has_log_2_to_lose_and_no_margin(recipe) -> None:
    for student in ({}, {"lora": {"rank": 2}}):
        made = recipe(student={"name": "sandbox", "model": "code-student-tiny", **student})
        loss, noted = first_loss(made)
        assert loss == pytest.approx(math.log(2), abs=1e-6)
        assert noted["rewards/margins"] == pytest.approx(0, abs=1e-5)


def test_cross_entropy_on_the_chosen_adds_its_weight(recipe) -> None:
    plain, _ = first_loss(recipe(method=SIMPO))
    more, noted = first_loss(recipe(method={**SIMPO, "chosen_ce": 0.7}))
    assert more - plain == pytest.approx(0.7 * noted["nll_loss"], rel=1e-4)
    with_ce, _ = first_loss(recipe(method={**DPO, "chosen_ce": 0.7}))
    assert with_ce - math.log(2) == pytest.approx(0.7 * noted["nll_loss"], rel=1e-4)


def test_simpo_at_no_margin_depends_on_mean_log_probabilities_alone(recipe) -> None:
    loss, _ = first_loss(recipe(method={**SIMPO, "gamma": 0.0, "beta": 1.5}))
    run = assemble(recipe(method=SIMPO))
    rows = [run.data.train[n] for n in range(4)]
    means = []
    for row in rows:
        stop = int(row["seq_lengths"][0])
        for part in (slice(stop), slice(stop, None)):
            ids, labels = (torch.tensor(row[name][part]) for name in ("input_ids", "labels"))
            with torch.no_grad():
                log_q = run.trainer.model.eval()(ids[None]).logits[0, :-1].log_softmax(-1)
            kept = labels[1:] != -100
            means.append(log_q.gather(-1, ids[1:, None])[kept].mean())
    apart = torch.stack(means).view(4, 2) @ torch.tensor([1.0, -1.0])
    assert loss == pytest.approx(-torch.nn.functional.logsigmoid(1.5 * apart).mean().item(), rel=1e-4)


def test_swapping_the_sides_negates_the_margin(recipe) -> None:
    _, noted = first_loss(recipe(method=SIMPO))
    swapped = [pair | {"chosen": pair["rejected"], "rejected": pair["chosen"]} for pair in PAIRS]
    Path("pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in swapped))
    _, turned = first_loss(recipe(method=SIMPO))
    assert turned["rewards/margins"] == pytest.approx(-noted["rewards/margins"], rel=1e-5)


@pytest.mark.parametrize(("method", "lora"), [(DPO, {"lora": {"rank": 2}}), (SIMPO, {})], ids=["adapters", "whole"])
def test_a_run_leaves_what_every_run_leaves_and_goes_on_bit_for_bit(recipe, method: Any, lora: Any) -> None:
    student = {"name": "sandbox", "model": "code-student-tiny", **lora}

    def made() -> Any:
        return recipe("training.eval_strategy=steps", "training.eval_steps=2", method=method, student=student)

    run = train(made())
    ended = student_of(run)
    said = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    results = json.loads((run / "results.json").read_text())
    assert results["steps"] == 5 and "eval_rewards/margins" in results
    assert method["name"] in (run / "student" / "README.md").read_text() and not (run / "README.md").exists()
    losses = [log for log in said if "loss" in log]
    assert {"loss", "rewards/margins", "logps/chosen", "memory_gib"} <= losses[0].keys()
    assert losses[-1]["rewards/margins"] > losses[0]["rewards/margins"]
    assert not list((run / "checkpoint-2").glob("ref"))
    train(made(), resume=str(run / "checkpoint-2"))
    again = student_of(run)
    assert all(torch.equal(ended[name], again[name]) for name in ended)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("data.packing=padding_free", "data.packing: TRL pads"),
        ("data.streaming=true", "data.streaming: TRL is given stored rows"),
        ("data.train.0.columns={weight: prompt}", "data.train.0.columns.weight: dpo counts all rows alike"),
        ("teacher={name: sandbox, model: code-teacher-tiny}", "teacher: dpo does not ask it"),
        ("method={name: dpo, reference: teacher}", "teacher: missing; dpo"),
        ("guards={entropy: {stop: {below: 1}}}", "guards: nothing is watched"),
        ("evaluation={rows: 2}", "evaluation: in TRL's trainer"),
        ("losses=[{name: forward_kl}]", "losses: DPO has its own"),
        ("rollouts={}", "rollouts: dpo trains on the data's text only"),
        ("data.train.0.path=sandbox:arithmetic/train", ""),
    ],
)  # fmt: skip
def test_what_means_nothing_to_trl_is_refused_by_its_key(recipe, override: str, said: str) -> None:
    made = recipe(override)
    if not said:  # of the sandbox's data nothing is looked at before they are made
        with pytest.raises(ValueError, match="DPO: it takes preferences"):
            assemble(made)
        return
    with pytest.raises(ValueError) as error:
        check(made)
    assert any(line.startswith(said) for line in str(error.value).splitlines()), str(error.value)


@pytest.mark.parametrize(("method", "said"), [("logit_kd", "would train on the rejected side"), ("redi", "")])
def test_kdlms_own_methods_refuse_preferences_unless_they_want_them(recipe, method: str, said: str) -> None:
    losses = [] if method == "redi" else [{"name": "cross_entropy"}]
    made = recipe(method={"name": method}, losses=losses)
    if not said:
        assert any(line.startswith("method: redi") for line in check(made))
        plain = recipe("data.train.0.columns={prompt: prompt, completion: chosen}", method={"name": "redi"})
        with pytest.raises(ValueError, match="redi: it takes preferences"):
            check(plain)
        return
    with pytest.raises(ValueError, match=said):
        check(made)


def test_a_plan_says_that_it_does_not_cover_it_and_the_catalogue_lists_it(recipe) -> None:
    assert "method: runs in TRL's DPOTrainer" in check(recipe())
    assert "method: runs in TRL's CPOTrainer" in check(recipe(method=SIMPO))
    with pytest.raises(ValueError, match="method: plan covers kdlm's own trainers so far, and dpo runs in TRL's"):
        predict(recipe(), device("H100"))
    found = {entry.name: entry for entry in entries() if entry.kind == "method"}
    assert (found["dpo"].paper, found["simpo"].paper) == ("arXiv 2305.18290", "arXiv 2405.14734")
