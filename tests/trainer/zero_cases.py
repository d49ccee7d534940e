"""Runs that are the same on any number of ranks, under DeepSpeed and without it."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tiny_models import rows, tiny_model
from torch import nn
from transformers import TrainingArguments

from kdlm import DistillTrainer
from kdlm.data import Collator
from kdlm.deepspeed import shape_of
from kdlm.losses import ForwardKL, kept_rows
from kdlm.methods import EmaOf, HiddenKD, LogitKD, Method, Step, Taid, Term, Terms, Trainable
from kdlm.sharding import sharded
from kdlm.teachers import LocalTeacher

LENGTHS = [5, 11, 3, 17, 8, 2, 13, 9]
STEPS = 4
STAGES = (1, 2, 3)


class Critic(Method):
    """A critic scores the student's hidden states, both move at every step or in turns, an average follows."""

    ema = 0.9

    def __init__(self, taking_turns: bool = False):
        made = Trainable(
            make=lambda student, teacher: nn.Linear(student.hidden_size, 1, bias=False), learning_rate=0.02
        )
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
        hidden = nets["student"](batch, kept_rows(batch["labels"])).hidden
        score = (nets["critic"](hidden).squeeze(-1) - 1).square().sum()
        return Terms({"score": Term(score), "size": Term(hidden.square().sum(), weight=0.1)})

    def evaluate(self, nets, batch, step: Step) -> Terms:
        return self.losses(nets, batch, frozenset(), step)


class InTwo(LogitKD):
    """The same loss, given out as two halves with a backward pass each."""

    def losses(self, nets, batch, active, step: Step) -> Iterator[Terms]:
        for more in (True, False):
            whole = super().losses(nets, batch, active, step)
            yield Terms({"half": Term(whole.terms["token_loss"].sum, weight=0.5)}, more=more)


def _logit_kd() -> LogitKD:
    return LogitKD([ForwardKL()])


CASES: dict[str, Callable[[], Method]] = {
    "logit_kd": _logit_kd,
    "lora": _logit_kd,
    "in_two": lambda: InTwo([ForwardKL()]),
    "accumulated": _logit_kd,
    "a rank without tokens": _logit_kd,
    "a sharded teacher": lambda: HiddenKD([ForwardKL()], layers=[(0, 1), (1, 2)]),
    "taid": Taid,
    "hidden_kd": lambda: HiddenKD([ForwardKL()], layers=[(0, 1), (1, 2)]),
    "critic": Critic,
    "turns": lambda: Critic(taking_turns=True),
}
ALONE = {"accumulated": "logit_kd", "a sharded teacher": "hidden_kd"}
"""The case that one process runs in place of another."""


def zero(stage: int) -> dict[str, Any]:
    """DeepSpeed's configuration of a stage, in which nothing is too small to be shared out."""
    sharing = {"stage": stage, "stage3_param_persistence_threshold": 0}
    auto = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    return {"zero_optimization": sharing, **dict.fromkeys(auto, "auto")}


def as_a_rank() -> None:
    """Give a process that was started alone what `torchrun --nproc-per-node 1` gives its one rank."""
    if "WORLD_SIZE" not in os.environ:
        place = {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        os.environ |= place | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}


def data(case: str) -> list[dict[str, Any]]:
    """Eight rows, read in order; in one case the half that the last of two ranks reads has no token to train on."""
    made: list[dict[str, Any]] = list(rows(LENGTHS))
    if case == "a rank without tokens":
        made[4:] = [{**row, "labels": [-100] * row["length"]} for row in made[4:]]
    return made


def made(
    folder: Path, case: str, ranks: int, stage: int | None = None, rows_of: str | None = None, **options: Any
) -> DistillTrainer:
    """A trainer whose optimiser step takes all eight rows (of another case), whatever the number of ranks."""
    parts = 2 if case == "accumulated" else 1
    args = TrainingArguments(
        output_dir=str(folder / case), report_to="none", use_cpu=True, max_steps=STEPS, seed=3,
        per_device_train_batch_size=8 // ranks // parts, gradient_accumulation_steps=parts,
        per_device_eval_batch_size=2, learning_rate=0.01, optim="adamw_torch", adam_epsilon=1e-4, weight_decay=0.1,
        lr_scheduler_type="linear", max_grad_norm=0.5, logging_steps=1, disable_tqdm=True,
        train_sampling_strategy="sequential", deepspeed=None if stage is None else zero(stage),
        **{"save_strategy": "no", **options},
    )  # fmt: skip
    student: Any = tiny_model(1)
    torch.manual_seed(6)  # of adapters and projectors
    if case == "lora":
        student = get_peft_model(student, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    teacher: Any = tiny_model(2, hidden=24, layers=3)
    if case == "a sharded teacher":
        model = teacher
        teacher = LocalTeacher(sharded(lambda: model, args.device), computes_on=args.device)
    return DistillTrainer(
        student, teacher, args, method=CASES[case](), train_dataset=data(rows_of or case),
        eval_dataset=rows([4, 9, 6], seed=7), data_collator=Collator(0, layout="padded"),
    )  # fmt: skip


def shares(trainer: DistillTrainer, ranks: int) -> dict[str, tuple[int, int]]:
    """Return the elements of student (and all beside it), teacher and optimiser on this rank, and of all there are.

    Raises AssertionError where this is not a run of so many ranks that share what its stage shares.
    """
    assert trainer.accelerator.num_processes == torch.distributed.get_world_size() == ranks
    assert torch.distributed.get_backend() == "gloo"
    engine: Any = trainer.model_wrapped
    cut = engine.zero_optimization_stage() == 3
    found = {"student": _share(trainer.networks.parameters(), ranks, cut)}
    if isinstance(trainer.teacher, LocalTeacher):
        found["teacher"] = _share(trainer.teacher.model.parameters(), ranks, trainer.teacher.in_shards)
    roles = [(trainer.networks.role[role], keys) for role, keys in trainer._trainable.items()]
    trained = sum(shape_of(role.get_parameter(key)).numel() for role, keys in roles for key in keys)
    moments = [v.numel() for s in engine.optimizer.optimizer.state.values() for k, v in s.items() if "exp_avg" in k]
    assert 0 < sum(moments) <= 2 * trained / ranks + 64 * len(moments), f"{sum(moments)} of 2 x {trained} moments"
    return found | {"optimiser": (sum(moments), 2 * trained)}


def _share(parameters: Any, ranks: int, cut: bool) -> tuple[int, int]:
    here = everything = 0
    for p in parameters:
        everything += shape_of(p).numel()
        here += (own := p.ds_tensor.numel() if cut else p.numel())
        assert own == (-(-p.ds_numel // ranks) if cut else p.numel()), f"{own} of {shape_of(p)}"
        assert not cut or p.numel() == 0, f"{shape_of(p)} is still whole"
    return here, everything


def curve(trainer: DistillTrainer) -> list[float]:
    """The losses that were logged, and last the evaluation's, which all ranks must ask for."""
    logged = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return [*logged, trainer.evaluate()["eval_loss"]]
