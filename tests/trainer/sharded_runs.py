"""The same few steps by one process and by several ranks, sharded in every way: for tests and benchmarks.

`sharded_runs.py FOLDER STRATEGY METHOD...` is one rank (see `forks.on_ranks`), or all there is: one run after another,
each in a folder of its method. `FOLDER STRATEGY save STEP METHOD...` leaves checkpoints every so many steps, and
`FOLDER STRATEGY resume SAVED STEP METHOD...` goes on from those in the folder SAVED. The global batch is eight
rows, whatever the ranks; of the second step's rows the first half has no token to train on, and so have the ranks that
read it. Rank 0 leaves the loss of every step and every network's weights, and each rank what it held.

A way to shard is a row of STRATEGIES: what TrainingArguments get, how the teacher is placed, what a rank does first.
"""

import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from cpu_sharding import shards_on_cpus
from safetensors.torch import load_file, save_file
from tiny_models import rows, tiny_model
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import TrainingArguments
from zero_cases import as_a_rank, shares, zero

from kdlm import DistillTrainer
from kdlm.data import Collator, TensorRows
from kdlm.diffusion import Karras, MixtureDenoiser, ResidualDenoiser
from kdlm.diffusion_trainer import DiffusionTrainer
from kdlm.losses import CrossEntropy, ForwardKL
from kdlm.methods import HiddenKD, LogitKD, MiniLM, SquareHead, Taid, TinyBERT
from kdlm.methods.diffusion.distribution_matching import DistributionMatching
from kdlm.models import Lora, adapt
from kdlm.models.frozen_copies import whole
from kdlm.sharding import held, own, sharded
from kdlm.sparsity import SparsitySection
from kdlm.sparsity.section import Cubic
from kdlm.teachers import LocalTeacher

GLOBAL_BATCH, STEPS, VOCAB = 8, 6, 64
LENGTHS = [5, 11, 3, 17, 8, 2, 13, 9, 7, 4, 12, 6, 10, 15, 3, 8]


@dataclass(frozen=True)
class Strategy:
    """A way to spread a run over ranks.

    Attributes:
        options: what TrainingArguments get beside what all runs have.
        placement: of a language model as the teacher.
        before: what each rank does first.
        shards: what each rank must hold no more than its share of: `student`, `teacher`, `optimiser`.
    """

    options: dict[str, Any] = field(default_factory=dict)
    placement: str = "resident"
    before: Callable[[], None] | None = None
    shards: frozenset[str] = frozenset()


FSDP2 = {"fsdp": True, "fsdp_config": {"version": 2, "state_dict_type": "FULL_STATE_DICT"}}
FSDP2_SHARDED = {"fsdp": True, "fsdp_config": {"version": 2, "state_dict_type": "SHARDED_STATE_DICT"}}
EVERYTHING = frozenset({"student", "teacher", "optimiser"})
STRATEGIES: dict[str, Strategy] = {
    "one process": Strategy(),
    "ddp": Strategy(),
    "ddp, teacher sharded": Strategy(placement="sharded", shards=frozenset({"teacher"})),
    "fsdp2": Strategy(FSDP2, "sharded", shards_on_cpus, EVERYTHING),
    "fsdp2, sharded checkpoints": Strategy(FSDP2_SHARDED, "sharded", shards_on_cpus, EVERYTHING),
    "zero1": Strategy({"deepspeed": zero(1)}, "sharded", as_a_rank),
    "zero2": Strategy({"deepspeed": zero(2)}, "sharded", as_a_rank),
    "zero3": Strategy({"deepspeed": zero(3)}, "sharded", as_a_rank),
}


def arguments(folder: Path, strategy: Strategy, **options: Any) -> TrainingArguments:
    """Return what all runs have: AdamW, no clipping unless asked for, every step logged."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    defaults = {
        "output_dir": str(folder / "run"), "report_to": "none", "use_cpu": True, "max_steps": STEPS,
        "per_device_train_batch_size": GLOBAL_BATCH // ranks, "learning_rate": 1e-2, "optim": "adamw_torch",
        "lr_scheduler_type": "linear", "max_grad_norm": 1.0, "save_strategy": "no", "logging_steps": 1,
        "logging_nan_inf_filter": False, "disable_tqdm": True, "seed": 3, "train_sampling_strategy": "sequential",
    }  # fmt: skip
    return TrainingArguments(**defaults | strategy.options | options)


def text_rows() -> list[dict[str, Any]]:
    """Return two global batches; the first four rows of the second have no token to train on."""
    made = rows(LENGTHS)
    return [{**row, "labels": [-100] * row["length"]} if 8 <= at < 12 else row for at, row in enumerate(made)]


def load_teacher(device_map: Any = None, **options: Any) -> Any:
    """Open the teacher, or its shape alone."""
    made = tiny_model(2, **{"hidden": 24, "layers": 3, "vocab": VOCAB, **options})
    return made if device_map is None else made.to("meta")


def language(
    method: Callable[[], Any],
    *,
    lora: bool = False,
    tied: bool = False,
    shape: Mapping[str, int] = MappingProxyType({}),
) -> Callable[..., DistillTrainer]:
    """Return what makes the trainer of a method on text, with a teacher of a shape."""

    def made(args: TrainingArguments, placement: str) -> DistillTrainer:
        load = partial(load_teacher, tie_word_embeddings=tied, **shape)
        teacher = (
            LocalTeacher(sharded(load, args.device), computes_on=args.device)
            if placement == "sharded"
            else LocalTeacher(load())
        )
        student: Any = tiny_model(1, vocab=VOCAB, tie_word_embeddings=tied)
        torch.manual_seed(5)  # adapters, projectors
        student = adapt(student, Lora(rank=4)) if lora else student
        return DistillTrainer(
            student, teacher, args, method=method(), train_dataset=text_rows(),
            eval_dataset=rows([4, 9, 6, 8, 5], seed=7), data_collator=Collator(0, layout="padded"),
        )  # fmt: skip

    return made


def turns(args: TrainingArguments, placement: str) -> DistillTrainer:
    """Return distribution matching of points in the plane: student and fake network train in turn."""
    torch.manual_seed(4)
    student = ResidualDenoiser((2,), width=16, depth=1)
    torch.nn.init.normal_(student.leave.weight, std=0.1)
    teacher = MixtureDenoiser(torch.randn(3, 2), 0.1, torch.full((3,), 1 / 3))
    method = DistributionMatching(
        steps=[5.0, 1.0], times=Karras(low=0.1, high=5.0), ratio=2, cadence="exclusive", fake="student", ema=0.8
    )
    data = TensorRows({"samples": torch.zeros(16, 2), "index": torch.arange(16)})
    return DiffusionTrainer(student, teacher, args, method=method, train_dataset=data)


def _logit_kd() -> LogitKD:
    return LogitKD([ForwardKL(temperature=2.0), CrossEntropy(weight=0.1)])


class Averaged(LogitKD):
    ema = 0.8


METHODS: dict[str, Callable[..., DistillTrainer]] = {
    "logit_kd": language(_logit_kd),
    "logit_kd, tied heads": language(_logit_kd, tied=True),
    "taid": language(Taid),
    "hidden_kd": language(lambda: HiddenKD([ForwardKL()], layers=[(0, 1), (1, 2)])),
    "lora": language(_logit_kd, lora=True),
    "two networks": turns,
}
INSIDE: dict[str, Callable[..., DistillTrainer]] = {
    "minilm": language(lambda: MiniLM(relation_heads=4)),
    "minilm, a lower layer": language(lambda: MiniLM(layers=(0, 1), relation_heads=4)),
    "tinybert": language(TinyBERT),
    "squarehead": language(lambda: SquareHead([ForwardKL()]), shape={"hidden": 16, "layers": 2}),
    "an average": language(lambda: Averaged([ForwardKL()])),
}
"""What looks inside the networks, or follows them."""


def sparse(section: dict[str, Any], made: Callable[..., DistillTrainer]) -> Callable[..., DistillTrainer]:
    """Return what makes the trainer of a student that is pruned step by step, up to the fourth of six."""

    def pruned(args: TrainingArguments, placement: str) -> DistillTrainer:
        trainer = made(args, placement)
        trainer.sparsify(SparsitySection(**section, schedule=Cubic(end=0.8, every=1)))
        return trainer

    return pruned


SPARSE: dict[str, Callable[..., DistillTrainer]] = {
    "sparse, layers": sparse({"share": 0.7}, METHODS["hidden_kd"]),
    "sparse, global": sparse({"share": 0.7, "scope": "global"}, METHODS["logit_kd, tied heads"]),
    "sparse, 2:4": sparse({"pattern": "2:4"}, INSIDE["squarehead"]),
    "sparse, wanda": sparse({"share": 0.6, "criterion": "wanda", "scope": "row"}, METHODS["logit_kd"]),
}


def made(folder: Path, method: str, strategy: str, **options: Any) -> DistillTrainer:
    """Return the trainer of a row, on this rank."""
    how = STRATEGIES[strategy]
    placement = how.placement if os.environ.get("WORLD_SIZE", "1") != "1" else "resident"  # shards are of several
    return {**METHODS, **INSIDE, **SPARSE}[method](arguments(folder, how, **options), placement)


def weights(trainer: DistillTrainer) -> dict[str, Tensor]:
    """Return copies of every network's weights, whole; every rank must ask."""
    nets = {**trainer.networks.role, **trainer.networks.averages}
    return {
        f"{role}.{name}": whole(p).detach().clone().contiguous()
        for role, module in nets.items()
        for name, p in module.named_parameters()
    }


def losses(trainer: DistillTrainer) -> list[float]:
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def parts(trainer: DistillTrainer) -> dict[str, list[Tensor]]:
    """Return the tensors of student (and all that trains beside it), teacher and optimiser."""
    found = {"student": list(trainer.networks.parameters())}
    if isinstance(trainer.teacher, LocalTeacher):
        found["teacher"] = list(trainer.teacher.model.parameters())
    optimizer: Any = trainer.optimizer
    found["optimiser"] = [v for s in optimizer.state.values() for v in s.values() if isinstance(v, Tensor) and v.ndim]
    return found


def check_shares(trainer: DistillTrainer, strategy: str) -> dict[str, tuple[int, int]]:
    """Return the elements of each part that this rank holds, and how many there are.

    Raises AssertionError where the ranks are not what was started, or hold other than their share of every tensor.
    """
    ranks, rank = int(os.environ.get("WORLD_SIZE", "1")), trainer.args.process_index
    assert trainer.accelerator.num_processes == ranks, "not as many ranks as were started"
    if ranks > 1:
        assert torch.distributed.get_world_size() == ranks and torch.distributed.get_backend() == "gloo"
    if trainer.is_deepspeed_enabled:
        return shares(trainer, ranks)
    found = {}
    for part, tensors in parts(trainer).items():
        found[part] = here, everything = held(tensors)
        wanted = everything
        if part in STRATEGIES[strategy].shards:  # whole slices of the first dimension, by torch.chunk
            wanted = sum(share_of(t, rank, ranks) for t in tensors)
            assert here <= everything / ranks + sum(t.numel() / len(t) for t in tensors), "far from a rank's share"
        assert here == wanted, f"{strategy}: rank {rank} holds {here} of {everything} of the {part}, not {wanted}"
    return found


def check_masks(trainer: DistillTrainer, strategy: str) -> None:
    """Raise AssertionError unless this rank has masks of what it holds, and zeros there: weights and moments alike."""
    optimizer: Any = trainer.optimizer
    for name, mask in trainer.sparsity.masks.items():
        weight = trainer.sparsity.layers[name].weight
        assert isinstance(weight, DTensor) == strategy.startswith("fsdp2")
        assert mask.shape == own(weight).shape and (own(weight)[mask] == 0).all(), name
        if not trainer.is_deepspeed_enabled:  # which has moments of many weights in a row
            for key in ("exp_avg", "exp_avg_sq"):
                assert (own(optimizer.state[weight][key])[mask] == 0).all(), f"{name}: {key}"


def share_of(tensor: Tensor, rank: int, ranks: int) -> int:
    chunks = torch.arange(len(tensor)).chunk(ranks)
    return len(chunks[rank]) * tensor.numel() // len(tensor) if rank < len(chunks) else 0


def left_by(trainer: DistillTrainer, folder: Path) -> None:
    """Write what a run came to: rank 0 losses, evaluation and weights."""
    end = weights(trainer)
    if trainer.is_world_process_zero():
        save_file(end, folder / "weights.safetensors")
        (folder / "losses.json").write_text(json.dumps(losses(trainer)))


def read(folder: Path) -> tuple[list[float], dict[str, Tensor]]:
    """Return the losses and weights of a run."""
    return json.loads((folder / "losses.json").read_text()), load_file(folder / "weights.safetensors")


def differences(ours: tuple[list[float], dict], other: tuple[list[float], dict]) -> tuple[float, float]:
    """Return the largest relative difference of a step's loss, and of a weight's change over the run to its norm."""
    curve = max(abs(a - b) / abs(b) for a, b in zip(ours[0], other[0], strict=True))
    assert ours[1].keys() == other[1].keys()
    return curve, max(((ours[1][k] - v).norm() / v.norm().clamp(min=1e-12)).item() for k, v in other[1].items())


def finish() -> None:
    """Leave without a teardown in which a rank may abort on a busy machine, with all of its work done."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)


def one_run(folder: Path, strategy: str, method: str, *, save: int = 0, resume: Path | None = None) -> None:
    """Train, check what this rank holds, and leave what came of it; text is evaluated too."""
    folder.mkdir(exist_ok=True)
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": save} if save else {}
    trainer = made(folder, method, strategy, **options)
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    held_here = check_shares(trainer, strategy)
    if trainer.sparsity is not None:
        check_masks(trainer, strategy)
    (folder / f"rank-{trainer.args.process_index}.json").write_text(json.dumps(held_here))
    evaluation = trainer.evaluate() if trainer.eval_dataset is not None else {}
    if not trainer.is_deepspeed_enabled:  # which keeps for a while what it will need again
        check_shares(trainer, strategy)  # what evaluation gathered is given up
    if trainer.is_world_process_zero():
        (folder / "evaluation.json").write_text(json.dumps(evaluation))
    left_by(trainer, folder)
    trainer.accelerator.wait_for_everyone()


def main(folder: Path, strategy: str, *words: str) -> None:
    if (before := STRATEGIES[strategy].before) is not None:
        before()
    match words:
        case ("save", step, *methods):
            for method in methods:
                one_run(folder / method, strategy, method, save=int(step))
        case ("resume", saved, step, *methods):
            for method in methods:
                one_run(folder / method, strategy, method, resume=Path(saved, method, "run", f"checkpoint-{step}"))
        case methods:
            for method in methods:
                one_run(folder / method, strategy, method)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), *sys.argv[2:])
    finish()
