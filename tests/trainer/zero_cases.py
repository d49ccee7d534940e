"""Runs that are the same on any number of ranks, under DeepSpeed and without it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tiny_models import rows, tiny_model
from torch import nn
from transformers import TrainingArguments

from kdlm import DistillTrainer
from kdlm.data import Collator
from kdlm.losses import ForwardKL, kept_rows
from kdlm.methods import EmaOf, HiddenKD, LogitKD, Method, Step, Taid, Term, Terms, Trainable

LENGTHS = [5, 11, 3, 17, 8, 2, 13, 9]
STEPS = 4
STAGES = (1, 2, 3)


class Critic(Method):
    """A critic scores the student's hidden states, both move at every step, and an average follows the student."""

    ema = 0.9

    def __init__(self, taking_turns: bool = False):
        made = Trainable(make=lambda student, teacher: nn.Linear(student.hidden_size, 1), learning_rate=0.02)
        self.taking_turns = taking_turns
        self.own = {"student": Trainable(), "critic": made, "average": EmaOf("student", decay=0.9)}

    @property
    def roles(self):
        return self.own

    @property
    def alternates(self) -> bool:
        return self.taking_turns

    def active(self, step: int) -> frozenset[str]:
        both = ("student", "critic")
        return frozenset({both[step % 2]} if self.taking_turns else both)

    def losses(self, nets, batch, active, step: Step) -> Terms:
        signal = nets["student"](batch, kept_rows(batch["labels"]))
        score = nets["critic"](signal.hidden).squeeze(-1)
        return Terms(
            {"score": Term((score - 1).square().sum()), "size": Term(signal.hidden.square().sum(), weight=0.1)}
        )

    def evaluate(self, nets, batch, step: Step) -> Terms:
        return self.losses(nets, batch, frozenset(), step)


class InTwo(LogitKD):
    """The same loss, given out as two halves with a backward pass each."""

    def losses(self, nets, batch, active, step: Step) -> Iterator[Terms]:
        for more in (True, False):
            whole = super().losses(nets, batch, active, step)
            yield Terms({"half": Term(whole.terms["token_loss"].sum, weight=0.5)}, more=more)


METHODS = {
    "logit_kd": lambda: LogitKD([ForwardKL()]),
    "lora": lambda: LogitKD([ForwardKL()]),
    "in_two": lambda: InTwo([ForwardKL()]),
    "taid": Taid,
    "hidden_kd": lambda: HiddenKD([ForwardKL()], layers=[(0, 1), (1, 2)]),
    "critic": Critic,
    "turns": lambda: Critic(taking_turns=True),
}


def zero(stage: int) -> dict[str, Any]:
    """DeepSpeed's configuration of a stage, in which nothing is too small to be shared out."""
    sharing = {"stage": stage, "stage3_param_persistence_threshold": 0}
    auto = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    return {"zero_optimization": sharing, **dict.fromkeys(auto, "auto")}


def made(folder: Path, case: str, ranks: int, stage: int | None = None, **options: Any) -> DistillTrainer:
    """A trainer whose optimiser step takes all eight rows, whatever the number of ranks."""
    accumulated = options.pop("accumulated", 1)
    data = options.pop("data", None) or rows(LENGTHS)
    args = TrainingArguments(
        output_dir=str(folder / case), report_to="none", use_cpu=True, max_steps=options.pop("steps", STEPS), seed=3,
        per_device_train_batch_size=8 // ranks // accumulated, gradient_accumulation_steps=accumulated,
        per_device_eval_batch_size=2, learning_rate=0.01, optim="adamw_torch", adam_epsilon=1e-4, weight_decay=0.1,
        lr_scheduler_type="linear", max_grad_norm=options.pop("max_grad_norm", 0.5), logging_steps=1, disable_tqdm=True,
        deepspeed=None if stage is None else zero(stage), **{"save_strategy": "no", **options},
    )  # fmt: skip
    student = tiny_model(1)
    if case == "lora":
        torch.manual_seed(6)
        student = get_peft_model(student, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    return DistillTrainer(
        student, tiny_model(2, hidden=24, layers=3), args, method=METHODS[case](), train_dataset=data,
        eval_dataset=rows([4, 9, 6], seed=7), data_collator=Collator(0, layout="padded"),
    )  # fmt: skip


def curve(trainer: DistillTrainer) -> list[float]:
    """The losses that were logged."""
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]
