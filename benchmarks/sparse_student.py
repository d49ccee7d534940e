"""A language model with half of its weights: how much of what pruning costs comes back, and by which loss?

    python benchmarks/sparse_student.py [--check] [--quick] [--save] [--dense FOLDER]

The dense model has the sandbox's smallest trained shape (0.1 M weights) and reads 1.5 M tokens of the standard library.
It is pruned by magnitude, every linear layer but the tied head by the same share, before the first step, and trains on
3 % of that library with itself, before pruning, as the teacher. Every arm reads the same tokens in the same order, with
the rate that was the best for it of a few. Figures are cross-entropy on held-out text, in nats per
token, the mean of three seeds, which draw the order of the text.

"recovered" is (magnitude + CE - arm) / (magnitude + CE - dense): of the loss that pruning and cross-entropy leave, how
much an arm takes away. "dense + CE" says what the same training does to a model that is not pruned.

--check exits 1 unless SquareHead recovers at least half at 50 %. --quick takes few steps with one seed: a smoke test
that gates nothing. --save writes benchmarks/results/sparse_student.json, anew after each level. --dense keeps the dense
model in a folder, or takes it from there.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).resolve().parent.parent
GATE = 0.5
LEVELS = {"50 %": {"share": 0.5}, "75 %": {"share": 0.75}, "2:4": {"pattern": "2:4"}}
GATED, BASELINE = "50 %", "magnitude + CE"


class Sizes(NamedTuple):
    """How much is trained and read."""

    seeds: int
    dense_steps: int
    steps: int
    documents: int


WHOLE, QUICK = Sizes(3, 3000, 150, 8), Sizes(1, 40, 5, 1)
BATCH, WINDOW = 16, 64


class Arm(NamedTuple):
    """A loss to compare.

    Attributes:
        make: returns the method, fresh.
        rates: learning rate by level, found on one seed each: for cross-entropy of 5e-4, 1e-3, 2e-3 and 3e-3 at 50 %,
            of 1e-3 and 3e-3 at 2:4, of 1e-3, 3e-3 and 6e-3 at 75 %; for the others of 1e-3 and 3e-3.
    """

    make: Callable[[], Any]
    rates: dict[str, float]


def arms() -> dict[str, Arm]:
    from kdlm.losses import CrossEntropy, ForwardKL
    from kdlm.methods import LogitKD, SquareHead

    high = dict.fromkeys(LEVELS, 3e-3)
    both = [CrossEntropy(weight=0.3), ForwardKL()]
    return {
        BASELINE: Arm(lambda: LogitKD([CrossEntropy()]), {**high, "50 %": 1e-3, "75 %": 6e-3}),
        "magnitude + CE + KL": Arm(lambda: LogitKD(both), high),
        "SquareHead + CE + KL": Arm(lambda: SquareHead(both, weight=0.1), high),
    }


@contextmanager
def unseen(name: str, steps: int) -> Iterator[Callable[[int, str], None]]:
    """Show no progress."""
    yield lambda count, said: None


def make_dense(folder: Path, steps: int) -> None:
    """Train the dense model and write it with its tokenizer."""
    from transformers import AutoTokenizer, Qwen3ForCausalLM

    from kdlm.sandbox import build
    from kdlm.sandbox.catalog import TINY_TEACHER
    from kdlm.sandbox.language_models import Training
    from kdlm.sandbox.pretraining import pretrain

    tokenizer = AutoTokenizer.from_pretrained(build("code-tokenizer-tiny"))
    config = TINY_TEACHER.config(len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id, 1024)
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(config)
    training = Training("teacher", steps=steps, batch=8, window=WINDOW, learning_rate=5e-3)
    pretrain(model, tokenizer, build("code"), training, 0, unseen, "dense")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@cache
def data(folder: Path, documents: int) -> tuple[Any, Any]:
    """Return the tokenizer, and text to train and to evaluate on."""
    from transformers import AutoTokenizer

    from kdlm.data import DataSection, load_data

    tokenizer = AutoTokenizer.from_pretrained(folder)
    sources = {"train": [{"path": "sandbox:code/train"}], "eval": [{"path": "sandbox:code/eval", "limit": documents}]}
    return tokenizer, load_data(DataSection.model_validate({**sources, "max_length": WINDOW}), tokenizer, seed=0)


def loss_of(folder: Path, method: Any, level: dict[str, Any] | None, rate: float, seed: int, sizes: Sizes) -> float:
    """Return the held-out cross-entropy of the dense model after pruning (None: not) and training (rate 0: not)."""
    from transformers import AutoModelForCausalLM, PrinterCallback, TrainingArguments

    from kdlm import DistillTrainer
    from kdlm.sparsity import SparsitySection
    from kdlm.sparsity.verb import prune

    tokenizer, text = data(folder, sizes.documents)
    student = AutoModelForCausalLM.from_pretrained(folder)
    taught = any(need.startswith("teacher") for need in method.needs)
    teacher = AutoModelForCausalLM.from_pretrained(folder) if taught else None
    with tempfile.TemporaryDirectory() as run:
        args = TrainingArguments(
            run, max_steps=sizes.steps, learning_rate=rate, lr_scheduler_type="cosine", warmup_steps=10, seed=seed,
            per_device_train_batch_size=BATCH, per_device_eval_batch_size=64, use_cpu=True, report_to="none",
            save_strategy="no", logging_strategy="no", disable_tqdm=True, dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = DistillTrainer(
            student, teacher, args, method=method, train_dataset=text.train, eval_dataset=text.eval,
            processing_class=tokenizer, data_collator=text.collator,
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        section = None if level is None else SparsitySection.model_validate(level)
        if section is not None and rate:
            trainer.sparsify(section)
        elif section is not None:
            prune(student, section)
        if rate:
            trainer.train()
        return trainer.evaluate()["eval_cross_entropy"]


def measured(folder: Path, sizes: Sizes) -> Iterator[dict[str, Any]]:
    """Train everything; yield the losses by level and arm after each level, and in the end those of a dense student."""
    from kdlm.losses import CrossEntropy
    from kdlm.methods import LogitKD

    alone = LogitKD([CrossEntropy()])
    dense = loss_of(folder, alone, None, 0.0, 0, sizes)
    print(f"dense: {dense:.4f}", flush=True)
    levels: dict[str, Any] = {}
    for level, section in LEVELS.items():
        pruned = loss_of(folder, alone, section, 0.0, 0, sizes)
        found = {
            name: [loss_of(folder, arm.make(), section, arm.rates[level], s, sizes) for s in range(sizes.seeds)]
            for name, arm in arms().items()
        }
        levels[level] = {"pruned, not trained": pruned, "arms": {n: of_arm(v, found, dense) for n, v in found.items()}}
        show(level, levels[level])
        yield {"dense": dense, "levels": levels}
    also = [loss_of(folder, LogitKD([CrossEntropy()]), None, 1e-3, seed, sizes) for seed in range(sizes.seeds)]
    print(f"\ndense + CE: {fmean(also):.4f}")
    yield {"dense": dense, "dense + CE": of_seeds(also), "levels": levels}


def of_seeds(losses: list[float]) -> dict[str, Any]:
    return {"loss": fmean(losses), "spread": stdev(losses) if len(losses) > 1 else 0.0, "seeds": losses}


def of_arm(losses: list[float], found: dict[str, list[float]], dense: float) -> dict[str, Any]:
    """Return an arm's mean, spread and losses, and how much it recovers of what the baseline leaves."""
    left = fmean(found[BASELINE]) - dense
    return {**of_seeds(losses), "recovered": (fmean(found[BASELINE]) - fmean(losses)) / left}


def show(level: str, found: dict[str, Any]) -> None:
    print(f"\n{level:24} loss              recovered\n{'pruned, not trained':24} {found['pruned, not trained']:.4f}")
    for name, arm in found["arms"].items():
        print(f"{name:24} {arm['loss']:.4f} ± {arm['spread']:.4f}   {arm['recovered']:6.0%}", flush=True)


def save(found: dict[str, Any], sizes: Sizes) -> None:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from machine import described

    about = {"machine": described(), "settings": sizes._asdict(), "cpu_seconds": round(sum(os.times()[:2]))}
    path = ROOT / "benchmarks" / "results" / "sparse_student.json"
    path.write_text(json.dumps({**about, "met": recovered(found) >= GATE, **found}, indent=1) + "\n")


def recovered(found: dict[str, Any]) -> float:
    """Return what SquareHead recovers at the level of the gate."""
    return found["levels"][GATED]["arms"]["SquareHead + CE + KL"]["recovered"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="exit 1 if the gate is missed")
    parser.add_argument("--quick", action="store_true", help="one seed and few steps: a smoke test")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/sparse_student.json")
    parser.add_argument("--dense", type=Path, metavar="FOLDER", help="keep the dense model there, or take it")
    args = parser.parse_args()
    from transformers.utils import logging

    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    sizes, found = QUICK if args.quick else WHOLE, {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.dense or Path(temporary)
        if not (folder / "config.json").is_file():
            make_dense(folder, sizes.dense_steps)
        for found in measured(folder, sizes):
            if args.save:
                save(found, sizes)
    share = recovered(found)
    print(f"\n{sum(os.times()[:2]):.0f} s of one core")
    print(f"of the loss that magnitude pruning at {GATED} and CE leave, SquareHead recovers {share:.0%}")
    return 1 if args.check and not args.quick and share < GATE else 0


if __name__ == "__main__":
    sys.exit(main())
