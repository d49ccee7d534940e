"""DistillationEvaluation: in a plain Trainer and in TRL's, the figures that DistillTrainer has of its own."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from forks import on_ranks
from safetensors.torch import load_file
from tiny_models import rows, tiny_model
from torch.nn.functional import kl_div, log_softmax
from transformers import Trainer
from transformers.trainer_utils import SaveStrategy

from kdlm import DistillationEvaluation, DistillTrainer
from kdlm.data import Collator
from kdlm.evaluation import EvaluationSection
from kdlm.losses import ForwardKL
from kdlm.methods import LogitKD

HELD_OUT = rows([4, 9, 6, 12, 3], seed=7)
SECTION = EvaluationSection(measures=["reverse_kl_to_teacher", "brier", "teacher_ece"], start=True, gap_closed=6.0)


def plain_trainer(args: Any, **options: Any) -> Trainer:
    data = {"train_dataset": rows([5, 11, 3, 17] * 4), "eval_dataset": HELD_OUT}
    return Trainer(tiny_model(1), args, data_collator=Collator(0, "padded"), **data, **options)


def by_hand(student: Any, teacher: Any) -> float:
    """KL(teacher || student) a token, row by row."""
    total, count = 0.0, 0
    for row in HELD_OUT:
        ids = torch.tensor([row["input_ids"]])
        kept = torch.tensor(row["labels"])[1:] != -100
        with torch.no_grad():
            ours, theirs = (log_softmax(model(ids).logits[0, :-1][kept], -1) for model in (student, teacher))
        total += kl_div(ours, theirs, reduction="sum", log_target=True).item()
        count += int(kept.sum())
    return total / count


def test_a_plain_trainer_reports_what_a_loop_by_hand_and_distilltrainer_do(arguments, tmp_path: Path) -> None:
    trainer = plain_trainer(arguments(remove_unused_columns=False))
    teacher = tiny_model(2, hidden=24)
    trainer.add_callback(DistillationEvaluation(trainer, teacher, SECTION))
    told = trainer.evaluate()
    assert told["eval_kl_to_teacher"] == pytest.approx(by_hand(trainer.model, teacher), rel=1e-5)
    ours = DistillTrainer(
        tiny_model(1), teacher, arguments(), eval_dataset=HELD_OUT, data_collator=Collator(0, "padded")
    )
    ours.watch(SECTION)
    own = ours.evaluate()
    for name in (
        "cross_entropy",
        "kl_to_teacher",
        "teacher_cross_entropy",
        *SECTION.measures,
        "kl_to_start",
        "gap_closed",
    ):
        assert told[f"eval_{name}"] == pytest.approx(own[f"eval_{name}"], rel=1e-5, abs=1e-9), name
    (logged,) = [logs for logs in trainer.state.log_history if "eval_brier" in logs]
    assert logged["eval_brier"] == told["eval_brier"]


def test_the_best_checkpoint_of_a_plain_trainer_is_chosen_by_it(arguments) -> None:
    args = arguments(
        remove_unused_columns=False,
        max_steps=6,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
    )
    trainer = plain_trainer(args)
    section = EvaluationSection(rows=3, start=True, gap_closed=True, best="kl_to_start")
    trainer.add_callback(DistillationEvaluation(trainer, tiny_model(2), section))
    trainer.train()
    told = {logs["step"]: logs for logs in trainer.state.log_history if "eval_kl_to_start" in logs}
    assert list(told) == [0, 2, 4, 6] and told[0]["eval_kl_to_start"] == 0
    assert trainer.state.best_global_step == 2, "the least is forgotten at first"
    assert trainer.evaluate()["eval_kl_to_start"] == pytest.approx(told[2]["eval_kl_to_start"], rel=1e-5)


class Averaged(LogitKD):
    ema = 0.5


def test_an_average_that_is_handed_out_is_that_of_the_best_checkpoint(arguments, tmp_path: Path) -> None:
    args = arguments(max_steps=6, eval_strategy="steps", eval_steps=2)
    data = {"train_dataset": rows([5, 11, 3, 17] * 4), "eval_dataset": HELD_OUT, "data_collator": Collator(0, "padded")}
    trainer = DistillTrainer(tiny_model(1), tiny_model(2), args, method=Averaged([ForwardKL()]), **data)
    with pytest.raises(ValueError, match=r"training\.save_strategy: no, but evaluation\.best takes a checkpoint"):
        trainer.watch(EvaluationSection(best="kl_to_start", start=True))
    args.save_strategy = SaveStrategy.STEPS
    trainer.watch(EvaluationSection(best="kl_to_start", start=True))
    trainer.train()
    assert trainer.state.best_global_step == 2
    saved = load_file(tmp_path / "run" / "checkpoint-2" / "kdlm" / "average.safetensors")
    handed = trainer.exported.state_dict()
    assert all(torch.equal(value, handed[name]) for name, value in saved.items())
    student = load_file(tmp_path / "run" / "checkpoint-2" / "model.safetensors")
    assert any(not torch.equal(value, saved[name]) for name, value in student.items()), "and it is no copy"


def test_several_splits_are_told_apart(arguments) -> None:
    trainer = plain_trainer(arguments(remove_unused_columns=False))
    trainer.eval_dataset = {"a": HELD_OUT, "b": HELD_OUT[:2]}
    trainer.add_callback(DistillationEvaluation(trainer, tiny_model(2)))
    told = trainer.evaluate()
    assert told["eval_a_kl_to_teacher"] != told["eval_b_kl_to_teacher"]


def test_without_a_teacher_the_student_is_watched_alone(arguments) -> None:
    trainer = plain_trainer(arguments(remove_unused_columns=False))
    trainer.add_callback(DistillationEvaluation(trainer, section=EvaluationSection(measures=["ece"])))
    told = trainer.evaluate()
    assert told["eval_cross_entropy"] > 0 and "eval_ece" in told and "eval_kl_to_teacher" not in told
    trainer = plain_trainer(arguments(remove_unused_columns=False))
    with pytest.raises(ValueError, match=r"evaluation\.measures: 'kl_to_teacher' cannot be had with this teacher"):
        DistillationEvaluation(trainer, section=EvaluationSection(measures=["kl_to_teacher"]))


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
def test_trl_trains_with_it(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    from transformers import AutoTokenizer

    from kdlm.sandbox import build

    tokenizer = AutoTokenizer.from_pretrained(build("code-student-tiny"))
    text = Dataset.from_dict({"text": [f"def f{n}(x):\n    return x + {n}\n" for n in range(8)]})
    args = trl.SFTConfig(
        str(tmp_path), use_cpu=True, max_steps=4, eval_strategy="steps", eval_steps=2, save_steps=2, report_to="none",
        logging_steps=1, max_length=32, bf16=False, disable_tqdm=True, per_device_train_batch_size=2,
    )  # fmt: skip
    trainer = trl.SFTTrainer(
        build("code-student-tiny").as_posix(), args, train_dataset=text, eval_dataset=text, processing_class=tokenizer
    )
    section = EvaluationSection(measures=["acceptance_rate"], best="acceptance_rate")
    from transformers import AutoModelForCausalLM

    teacher = AutoModelForCausalLM.from_pretrained(build("code-teacher-tiny"))
    trainer.add_callback(DistillationEvaluation(trainer, teacher, section))
    trainer.train()
    told = {
        logs["step"]: logs["eval_acceptance_rate"]
        for logs in trainer.state.log_history
        if "eval_acceptance_rate" in logs
    }
    assert list(told) == [2, 4] and trainer.state.best_global_step == max(told, key=told.get)


@pytest.mark.parametrize("kind", ["distil", "plain"])
def test_two_ranks_read_what_one_process_does(tmp_path: Path, kind: str) -> None:
    told = []
    for count in (1, 2):
        folder = tmp_path / str(count)
        folder.mkdir()
        on_ranks(count, Path(__file__).with_name("two_ranks_evaluation.py"), folder, kind)
        told.append(load_file(folder / "metrics.safetensors"))
    one, two = told
    assert one.keys() == two.keys() and {"eval_kl_to_start", "eval_teacher_ece", "eval_gap_closed"} <= one.keys()
    assert kind == "plain" or {"eval_distinct_1", "eval_other_cross_entropy"} <= one.keys()
    for name, value in one.items():
        assert two[name].item() == pytest.approx(value.item(), rel=1e-9, abs=1e-12), name
