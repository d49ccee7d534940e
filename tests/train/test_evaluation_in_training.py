"""The section `evaluation` of a recipe: what it adds to every evaluation, and which checkpoint it hands out."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kdlm.check import check
from kdlm.evaluation import EvaluationSection
from kdlm.evaluation.start import start_of
from kdlm.recipe import load
from kdlm.samples import SampleLog
from kdlm.train import assemble, train
from kdlm.verifiers import Verdict

RECIPE = """
student: {name: sandbox, model: code-student-tiny}
teacher: {name: sandbox, model: code-teacher-tiny}
data: {train: [{path: "sandbox:code/train", limit: 4}], max_length: 32, eval_rows: 1}
method: {name: logit_kd}
losses: [{name: forward_kl}]
evaluation:
  rows: 12
  measures: [reverse_kl_to_teacher, perplexity, ece]
  start: true
  other: [{path: "sandbox:code/eval", limit: 1}]
  gap_closed: true
  generations: {prompts: 3, max_new_tokens: 6, prompt_tokens: 8}
  best: kl_to_start
training: {max_steps: 6, per_device_train_batch_size: 4, learning_rate: 0.01, logging_steps: 2,
           eval_strategy: steps, eval_steps: 2, use_cpu: true}
run_dir: {RUN}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.replace("{RUN}", str(tmp_path / "run")))
    return path


def evaluations(folder: Path) -> dict[int, dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line for line in lines if "eval_loss" in line}


def results_of(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "student" / "model.safetensors")


def test_every_evaluation_says_what_was_asked_for_from_the_start_on(recipe: Path) -> None:
    folder = train(load(recipe))
    told = evaluations(folder)
    written = SampleLog(folder).read()
    assert [one.step for one in written] == [0, 0, 0, 2, 2, 2, 4, 4, 4, 6, 6, 6]
    assert len({one.prompt for one in written}) == 3 and "step 6" in (folder / "samples.html").read_text()
    assert list(told) == [0, 2, 4, 6]
    began = told[0]
    assert (began["eval_gap_closed"], began["eval_kl_to_start"], began["eval_other_kl_to_start"]) == (0, 0, 0)
    for line in list(told.values())[1:]:
        way = began["eval_cross_entropy"] - line["eval_teacher_cross_entropy"]
        gone = began["eval_cross_entropy"] - line["eval_cross_entropy"]
        assert line["eval_gap_closed"] == pytest.approx(gone / way)
        assert line["eval_perplexity"] == pytest.approx(math.exp(line["eval_cross_entropy"]))
        assert line["eval_kl_to_start"] > 0 and line["eval_other_kl_to_start"] > 0
        assert {"eval_reverse_kl_to_teacher", "eval_ece", "eval_other_cross_entropy"} <= line.keys()
        assert 0 < line["eval_length"] <= 6 and 0 < line["eval_distinct_1"] <= 1 and 0 <= line["eval_truncated"] <= 1


@pytest.mark.parametrize("lora", ["null", "{rank: 4}", "{rank: 4, export: adapter}"])
def test_the_best_checkpoint_is_handed_out_and_named(recipe: Path, lora: str) -> None:
    folder = train(load(recipe, [f"student.lora={lora}"]))
    told, results = evaluations(folder), results_of(folder)
    best = min((step for step in told if step), key=lambda step: told[step]["eval_kl_to_start"])
    assert best < 6, "who trains on forgets more, so that the last checkpoint is not the best"
    value = told[best]["eval_kl_to_start"]
    assert results["best"] == {"step": best, "metric": "eval_kl_to_start", "value": value}
    assert f"step {best}, the best by eval_kl_to_start" in (folder / "student" / "README.md").read_text()
    figures = {key: value for key, value in told[best].items() if key.startswith("eval_")}
    assert {key: results[key] for key in figures} == figures
    if "adapter" in lora:
        saved = load_file(folder / f"checkpoint-{best}" / "adapter_model.safetensors")
        ours = load_file(folder / "student" / "adapter_model.safetensors")
        assert all(torch.equal(ours[name], saved[name]) for name in saved)
        return
    handed = load(recipe, [f"student={{name: pretrained, path: {folder / 'student'}}}", "evaluation={rows: 12}"])
    again = assemble(handed).trainer.evaluate()
    assert again["eval_kl_to_teacher"] == pytest.approx(results["eval_kl_to_teacher"], rel=1e-4)


def test_a_run_whose_metric_is_never_finite_hands_out_its_last_step_and_says_so(recipe: Path, capsys) -> None:
    overrides = ["training.learning_rate=1e30", "evaluation={rows: 12, best: kl_to_teacher}"]
    folder = train(load(recipe, overrides))
    note = "note: no checkpoint has a finite eval_kl_to_teacher: the student is that of the last step"
    assert note in capsys.readouterr().out
    assert results_of(folder)["best"] == {"step": None, "metric": "eval_kl_to_teacher", "value": None}
    assert "| checkpoint | the last |" in (folder / "student" / "README.md").read_text()


def test_a_resumed_run_knows_start_best_and_sample_of_the_unbroken_one(recipe: Path, tmp_path: Path) -> None:
    whole = train(load(recipe))
    part = load(recipe, [f"run_dir={tmp_path / 'part'}"])
    train(part)
    for name in ("checkpoint-6", "checkpoint-4", "student", "results.json"):  # as if killed after its first checkpoint
        path = part.run_dir / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    train(part, resume=True)
    ours, theirs = evaluations(whole), evaluations(part.run_dir)
    timed = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second")
    assert list(ours) == list(theirs)
    for step, line in ours.items():
        assert {k: v for k, v in line.items() if k not in timed} == {
            k: v for k, v in theirs[step].items() if k not in timed
        }
    assert results_of(whole)["best"] == results_of(part.run_dir)["best"]
    assert all(torch.equal(value, weights(part.run_dir)[name]) for name, value in weights(whole).items())


def test_what_is_evaluated_does_not_change_what_is_learned(recipe: Path, tmp_path: Path) -> None:
    dropout = "student.lora={rank: 4, dropout: 0.5}"  # draws random numbers at every step
    watched = train(load(recipe, [dropout, f"run_dir={tmp_path / 'watched'}"]))
    alone = ["evaluation=null", "training.eval_strategy=no", "training.save_steps=6", f"run_dir={tmp_path / 'alone'}"]
    ours, theirs = (
        load_file(folder / "checkpoint-6" / "adapter_model.safetensors")
        for folder in (watched, train(load(recipe, [dropout, *alone])))
    )
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_a_sample_is_the_same_for_every_seed_of_the_run_and_another_for_another_seed_of_its_own(recipe: Path) -> None:
    def sample(*overrides: str) -> list[int]:
        trainer = assemble(load(recipe, overrides)).trainer
        return [int(index) for index in trainer.get_eval_dataloader().dataset["index"]]

    assert len(sample()) == 12 and sample() == sample("seed=5") != sample("evaluation.seed=1")


def test_the_start_of_adapters_is_their_base_and_takes_no_memory(recipe: Path) -> None:
    plain, adapted = (assemble(load(recipe, overrides)).trainer for overrides in ([], ["student.lora={rank: 4}"]))
    assert plain._watch.start.module is not plain.student and adapted._watch.start.module is adapted.student
    flags = [p.requires_grad for p in adapted.student.parameters()]
    assert adapted.evaluate()["eval_kl_to_start"] == 0
    assert [p.requires_grad for p in adapted.student.parameters()] == flags
    with torch.no_grad():
        for parameter in adapted.student.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    moved = adapted.evaluate()
    assert moved["eval_kl_to_start"] > 1e-3
    adapted._watch.start = plain._watch.start  # a copy of the same model, which says the same
    assert adapted.evaluate()["eval_kl_to_start"] == pytest.approx(moved["eval_kl_to_start"], rel=1e-5)


def test_adapters_that_do_something_already_are_copied(recipe: Path) -> None:
    model = assemble(load(recipe, ["student.lora={rank: 4}"])).trainer.student
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.1)
    assert start_of(model, torch.device("cpu")).module is not model


WRONG = {
    "evaluation.measures=[reverse_kl]": "evaluation.measures: 'reverse_kl' is not reported",
    "evaluation.best=kl_to_techer": "evaluation.best: 'kl_to_techer' is not reported, did you mean kl_to_teacher?",
    "evaluation.best=brier": "evaluation.best: 'brier' is not reported",
    "evaluation.best=length": "evaluation.best: of length neither more nor less is known to be better",
    "training.eval_strategy=no": "training.eval_strategy: evaluation.best chooses among evaluations",
    "training.save_steps=4": "training.save_steps: 4, but evaluation.best takes a checkpoint at every evaluation",
    "training.save_strategy=epoch": "training.save_strategy: epoch, but evaluation.best takes a checkpoint",
    "training.metric_for_best_model=loss": "training.metric_for_best_model: loss is not evaluation.best",
    "data.eval_rows=null": "evaluation: there are no rows to evaluate",
    "teacher=null": "evaluation.measures: 'reverse_kl_to_teacher' cannot be had with this teacher",
}


@pytest.mark.parametrize(("override", "message"), WRONG.items(), ids=WRONG)
def test_check_refuses_what_evaluation_cannot_do(recipe: Path, override: str, message: str) -> None:
    more = ["losses=[{name: cross_entropy}]"] if override == "teacher=null" else []
    with pytest.raises(ValueError, match=message.replace("[", r"\[").replace("?", r"\?")):
        check(load(recipe, [override, *more]))


def test_check_refuses_what_a_teacher_of_few_tokens_cannot_tell(recipe: Path, tmp_path: Path) -> None:
    of = "{name: sandbox, model: code-teacher-tiny}"
    few = f"teacher={{name: cached, path: {tmp_path / 'none'}, of: {of}, format: {{name: top_k, k: 8}}}}"
    with pytest.raises(ValueError, match="evaluation") as refused:
        check(load(recipe, [few, "evaluation.measures=[teacher_brier, top5_agreement]"]))
    said = str(refused.value)
    assert "evaluation.measures: 'teacher_brier' cannot be had with this teacher. There are cross_entropy" in said
    assert "evaluation.gap_closed: it takes a teacher of the same tokenizer, and all of its distribution" in said
    assert "'top5_agreement'" not in said


def test_check_says_what_is_evaluated(recipe: Path) -> None:
    assert "evaluation: at most 12 rows, best checkpoint by kl_to_start" in check(load(recipe))


def test_plain_text_without_a_length_of_prompts_is_refused_by_its_key(recipe: Path) -> None:
    with pytest.raises(ValueError, match=r"evaluation\.generations\.prompt_tokens: the data hold plain text"):
        assemble(load(recipe, ["evaluation.generations.prompt_tokens=null"]))


def test_a_metric_that_only_the_run_knows_to_be_missing_is_named_at_the_first_evaluation(recipe: Path) -> None:
    run = assemble(load(recipe))
    run.trainer._evaluation = EvaluationSection(best="eh")
    with pytest.raises(ValueError, match=r"evaluation\.best: 'eh' is not reported"):
        run.trainer.train()


def test_a_baseline_stands_in_for_the_start(recipe: Path) -> None:
    told = assemble(load(recipe, ["evaluation.gap_closed=7.5"])).trainer.evaluate()
    way = 7.5 - told["eval_teacher_cross_entropy"]
    assert told["eval_gap_closed"] == pytest.approx((7.5 - told["eval_cross_entropy"]) / way)


class LongEnough:
    """Stands in for a Judge: right is what is no shorter than the reference."""

    def judge(self, texts: list[str], references: list[str]) -> list[Verdict]:
        self.references = references
        return [Verdict(float(len(one) >= len(other))) for one, other in zip(texts, references, strict=True)]

    def close(self) -> None:
        self.closed = True


def test_the_text_that_a_student_writes_is_judged_where_there_is_a_verifier(recipe: Path) -> None:
    sums = [
        "data.train=[{path: 'sandbox:arithmetic/train', limit: 40}]",
        "data.eval=[{path: 'sandbox:arithmetic/eval', limit: 6}]",
        *("data.eval_rows=null", "data.max_length=64", "verifier={name: answer}", "evaluation.other=null"),
        "evaluation.generations={prompts: 4, max_new_tokens: 4}",
    ]
    check(load(recipe, sums))  # a verifier without rollouts is of use
    trainer = assemble(load(recipe, sums)).trainer
    judge = LongEnough()
    trainer._watch.writer.judge = judge
    assert 0 <= trainer.evaluate()["eval_score"] <= 1
    assert judge.references == [row["reference"] for row in trainer.eval_dataset.select(range(4))]
    trainer.close()
    assert judge.closed


def test_memory_and_pace_stand_in_every_line_of_training(recipe: Path) -> None:
    folder = train(load(recipe, ["evaluation={rows: 12}"]))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    logged = [line for line in lines if "loss" in line]
    assert len(logged) == 3 and all(0.01 < line["memory_gib"] < 64 and line["tokens_per_second"] > 0 for line in logged)
