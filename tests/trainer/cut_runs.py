"""The same few steps by one process and by ranks that have a part of every sequence each, for tests and benchmarks.

`cut_runs.py FOLDER PARTS STAGE CASE...` is one rank (see `forks.on_ranks`), or all there is: one run after another,
each in a folder of its case, as `sharded_runs` leaves them; `... STAGE save STEP CASE...` and `... STAGE resume SAVED
STEP CASE...` as there; `... STAGE recipe` is `kdlm train FOLDER/recipe.yaml`. STAGE is ZeRO's. Asserted on each rank:
the world, its part, how long what its student reads is.
"""

import json
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import ParallelismConfig
from sharded_runs import GLOBAL_BATCH, VOCAB, Averaged, Strategy, arguments, finish, left_by, load_teacher, text_rows
from tiny_models import rows, tiny_model
from zero_cases import as_a_rank, shares, zero

from kdlm import DistillTrainer
from kdlm.data import Collator
from kdlm.losses import CrossEntropy, ForwardKL, ReverseKL, count_kept
from kdlm.methods import GKD, LogitKD, Method, SequenceKD, Taid
from kdlm.models import Lora, adapt
from kdlm.recipe import load
from kdlm.teachers import LocalTeacher
from kdlm.train import train


def beginnings() -> list[dict[str, Any]]:
    """Return rows of which only the first tokens are trained on: ranks with a later part have nothing to do."""
    return [{**row, "labels": [*row["input_ids"][:4], *[-100] * 12]} for row in rows([16] * 8)]


CASES: dict[str, Callable[[], Method]] = {
    "logit_kd": lambda: LogitKD([ForwardKL(temperature=2.0), CrossEntropy(weight=0.1)]),
    "taid": Taid,
    "sequence_kd": lambda: SequenceKD([CrossEntropy()]),
    "gkd": lambda: GKD([ReverseKL()], student_share=0.0),
    "lora": lambda: LogitKD([ForwardKL()]),
    "average": lambda: Averaged([ForwardKL()]),
    "accumulated": lambda: LogitKD([ForwardKL()]),
    "checkpointed": lambda: LogitKD([ForwardKL()]),
    "beginnings": lambda: LogitKD([ForwardKL()]),
}


def made(folder: Path, case: str, parts: int, stage: int, **options: Any) -> DistillTrainer:
    """Return the trainer of a case: as one process, or on groups of `parts` ranks under DeepSpeed."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    how: dict[str, Any] = {}
    if ranks > 1:
        config = ParallelismConfig(sp_size=parts, dp_replicate_size=ranks // parts)
        how = {"deepspeed": zero(stage), "parallelism_config": config}
    steps = 2 if case == "accumulated" else 1
    size = {
        "per_device_train_batch_size": GLOBAL_BATCH // (ranks // parts) // steps,
        "gradient_accumulation_steps": steps,
    }
    how |= {"gradient_checkpointing": True} if case == "checkpointed" else {}
    args = arguments(folder, Strategy(how), **size, per_device_eval_batch_size=2, **options)
    student: Any = tiny_model(1, vocab=VOCAB)
    torch.manual_seed(5)
    student = adapt(student, Lora(rank=4)) if case == "lora" else student
    return DistillTrainer(
        student, LocalTeacher(load_teacher()), args, method=CASES[case](),
        train_dataset=beginnings() if case == "beginnings" else text_rows(),
        eval_dataset=rows([4, 9, 6, 8, 5], seed=7), data_collator=Collator(0, layout="padded"),
    )  # fmt: skip


@dataclass
class Seen:
    """Of each micro-batch: how long its sequences are, and how long what the student reads of them; this rank's rows;
    the bytes that its graph keeps for the backward pass, weights left out."""

    given: list[int] = field(default_factory=list)
    read: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    kept: list[int] = field(default_factory=list)


def watched(trainer: DistillTrainer) -> Seen:
    """Return what fills with what is seen of a run."""
    seen, compute, embeds = Seen(), trainer.compute_loss, trainer.student.get_input_embeddings()

    def computing(model: Any, inputs: dict[str, Any], *args: Any, **options: Any) -> Any:
        weights = {p.untyped_storage().data_ptr() for p in trainer.networks.parameters()}
        bytes_at: dict[int, int] = {}

        def packed(x: torch.Tensor) -> torch.Tensor:
            bytes_at[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(packed, lambda x: x):
            loss = compute(model, inputs, *args, **options)
        seen.given.append(inputs["input_ids"].shape[1])
        seen.rows.append(int(count_kept(inputs["labels"])))
        seen.kept.append(sum(size for at, size in bytes_at.items() if at not in weights))
        return loss

    trainer.compute_loss = computing
    embeds.register_forward_pre_hook(
        lambda module, args: seen.read.append(args[0].shape[1]) if module.training else None
    )
    return seen


def one_run(folder: Path, case: str, parts: int, stage: int, *, save: int = 0, resume: Path | None = None) -> None:
    """Train, check what this rank was and read, and leave what came of it."""
    folder.mkdir(exist_ok=True)
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": save} if save else {}
    trainer = made(folder, case, parts, stage, **options)
    seen = watched(trainer)
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks > 1:
        shares(trainer, ranks)
        assert (trainer.part.number, trainer.part.of) == (trainer.args.process_index % parts, parts)
    assert seen.read == [-(-length // parts) for length in seen.given], f"{seen} in {parts} parts"
    evaluation = trainer.evaluate()
    if trainer.is_world_process_zero():
        (folder / "evaluation.json").write_text(json.dumps(evaluation["eval_loss"]))
    (folder / f"seen-{trainer.args.process_index}.json").write_text(json.dumps(asdict(seen)))
    left_by(trainer, folder)
    trainer.accelerator.wait_for_everyone()


def main(folder: Path, parts: int, stage: int, *words: str) -> None:
    if "WORLD_SIZE" in os.environ:
        as_a_rank()
    match words:
        case ("save", step, *cases):
            for case in cases:
                one_run(folder / case, case, parts, stage, save=int(step))
        case ("resume", saved, step, *cases):
            for case in cases:
                one_run(folder / case, case, parts, stage, resume=Path(saved, case, "run", f"checkpoint-{step}"))
        case ["recipe"]:
            sizes = {"SP_SIZE": parts, "DP_REPLICATE_SIZE": int(os.environ.get("WORLD_SIZE", "1")) // parts}
            if parts > 1:  # as accelerate launch says it
                os.environ |= {f"PARALLELISM_CONFIG_{name}": str(size) for name, size in sizes.items()}
                os.environ["ACCELERATE_USE_PARALLELISM_CONFIG"] = "true"
            train(load(folder / "recipe.yaml"))
        case cases:
            for case in cases:
                one_run(folder / case, case, parts, stage)


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", FutureWarning)  # DeepSpeed calls what torch renames
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:])
    finish()
