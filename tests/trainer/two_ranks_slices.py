"""One of the ranks that hold slices of every layer, or the one that holds all: for `test_slices_of_layers.py`.

`two_ranks_slices.py FOLDER STUDENT TEACHER`, each `whole` or `sliced`, trains every row of METHODS on the models in
FOLDER and leaves losses, evaluation and weights, and which heads were gathered in training.
`FOLDER STUDENT TEACHER save STEP` runs `hidden_kd`, whose projectors are whole beside slices, with checkpoints every so
many steps, and `FOLDER STUDENT TEACHER resume CHECKPOINT` goes on from one.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from cpu_sharding import shards_on_cpus
from safetensors.torch import save_file
from sharded_runs import finish
from tiny_models import rows
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, TrainingArguments

from kdlm import DistillTrainer, signal
from kdlm.data import Collator
from kdlm.losses import DKD, CrossEntropy, ForwardKL, ReverseKL
from kdlm.methods import HiddenKD, LogitKD
from kdlm.models.frozen_copies import whole

VOCAB, RANKS = 61, int(os.environ.get("WORLD_SIZE", "1"))
METHODS = {
    "logit_kd": lambda: LogitKD([ForwardKL(temperature=2.0), ReverseKL(weight=0.5), CrossEntropy(weight=0.1)]),
    "a loss without a kernel": lambda: LogitKD([DKD()]),
    "hidden_kd": lambda: HiddenKD([ForwardKL()], layers=[(0, 1)]),
}


def save_models(folder: Path, *, tied: bool, teacher_ids: int, heads: int = 2) -> None:
    """Write a student and a teacher of a few thousand weights in fp64; 61 ids do not divide by two."""
    for seed, name, ids, hidden, layers in ((1, "student", VOCAB, 16, 2), (2, "teacher", teacher_ids, 24, 3)):
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=ids, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
            num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=64, pad_token_id=0,
            initializer_range=0.3, tie_word_embeddings=tied,
        )  # fmt: skip
        LlamaForCausalLM(config).double().save_pretrained(folder / name)


def opened(folder: Path, how: str) -> Any:
    """Open a model, whole or sliced over all ranks by transformers' own plan."""
    if how == "whole":
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    from transformers.distributed.configuration_utils import DistributedConfig

    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, distributed_config=DistributedConfig(tp_size=RANKS)
    )


def check_slices(model: Any, *, sliced: bool) -> None:
    """Raise AssertionError unless this rank holds its slice of what tensor parallelism slices, and of that alone."""
    for name, parameter in model.named_parameters():
        own = isinstance(parameter, DTensor)
        assert own == (sliced and "norm" not in name), name
        if own:
            here, size = parameter.to_local().numel(), max(parameter.shape)
            assert here <= parameter.numel() * -(-size // RANKS) / size, f"{name}: {here} of {parameter.numel()}"


def one_run(
    folder: Path, student: str, teacher: str, method: str, *, resume: str | None = None, **options: Any
) -> dict[str, Any]:
    saving: dict[str, Any] = {"save_strategy": "no"} | options
    args = TrainingArguments(
        output_dir=str(folder / "run"), report_to="none", use_cpu=True, max_steps=4, per_device_train_batch_size=3,
        gradient_accumulation_steps=2, per_device_eval_batch_size=2, learning_rate=1e-2, lr_scheduler_type="linear",
        optim="adamw_torch", max_grad_norm=0.5, logging_steps=1, logging_nan_inf_filter=False, weight_decay=0.1,
        disable_tqdm=True, seed=3, **saving,
    )  # fmt: skip
    ours, theirs = opened(folder / "student", student), opened(folder / "teacher", teacher)
    check_slices(ours, sliced=student == "sliced")
    check_slices(theirs, sliced=teacher == "sliced")
    torch.manual_seed(5)  # projectors
    trainer = DistillTrainer(
        ours, theirs, args, method=METHODS[method](), train_dataset=rows([5, 11, 3, 17, 8, 2, 13, 9, 7, 4, 12, 6]),
        eval_dataset=rows([4, 9, 6, 8, 5], seed=7), data_collator=Collator(0, layout="padded"),
    )  # fmt: skip
    ranks = RANKS if "sliced" in (student, teacher) else 1
    assert trainer.accelerator.num_processes == ranks and trainer.data_ranks == 1
    gathers, gathered = [], signal._gathered
    signal._gathered = lambda x: (gathers.append(tuple(x.shape)), gathered(x))[1]
    trainer.train(resume_from_checkpoint=resume)
    check_slices(ours, sliced=student == "sliced")
    figures = trainer.evaluate()
    signal._gathered = gathered
    weights = {k: whole(p).detach().clone().contiguous() for k, p in trainer.networks.named_parameters()}
    out = folder / f"{student}-{teacher}" / method
    trainer.save_model(str(out / "saved"))
    if trainer.is_world_process_zero():
        save_file(weights, out / "weights.safetensors")
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    pace = {line["tokens_per_second"] for line in trainer.state.log_history if "tokens_per_second" in line}
    assert all(pace)
    return {
        "losses": losses,
        "norms": [line["grad_norm"] for line in trainer.state.log_history if "grad_norm" in line],
        "evaluation": {k: v for k, v in figures.items() if "runtime" not in k and "per_second" not in k},
        "gathered": gathers,
    }


def main(folder: Path, student: str, teacher: str, *words: str) -> None:
    shards_on_cpus()
    options: dict[str, Any] = {}
    match words:
        case ("save", step):
            options = {"save_strategy": "steps", "save_steps": int(step)}
        case ("resume", checkpoint):
            options = {"resume": checkpoint}
    for method in ["hidden_kd"] if words else METHODS:
        out = folder / f"{student}-{teacher}" / method
        out.mkdir(parents=True, exist_ok=True)
        found = one_run(folder, student, teacher, method, **options)
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        (out / f"rank-{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), *sys.argv[2:])
    finish()
