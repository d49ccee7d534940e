"""Trained tokens per second on one CPU core: `kdlm train` beside TRL's GKDTrainer and DistillationTrainer.

    python benchmarks/train_throughput_cpu.py [--quick] [--check] [--save]

The same work three times: the quick start's models, token rows, batches, order, AdamW, schedule and loss (forward KL
to the teacher at temperature 1), fp32, no checkpointing of activations, nothing logged, evaluated or saved. Every
trainer runs in a process of its own on one thread, in turn, several times over. A step's time is the median over the
repetitions of that same step; the first steps are left out. That the work is the same is checked: each trainer's own
count of trained tokens, step by step, the loss of its first step and the mean loss of its run.

kdlm: what `kdlm train` assembles from the recipe. GKD: beta 0 (forward KL), lmbda 0 (never its own text), kdlm's
collator in place of its chat collator: it makes the batch that GKD's loss reads. DistillationTrainer: beta 0. It trains
on text that it generates only, so its generation is replaced by a collation of the given rows (first token as prompt,
the rest as completion); it does not pay for generating, tokenising or measuring completions. Its chunked divergence
stays as it is.

The figure is kdlm's tokens/s over those of the better of the two. --check exits 1 when it is below 1, --quick takes
the tiny pair and few steps (a smoke test), --save writes benchmarks/results/train_throughput_cpu.json.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median
from typing import Any

from transformers import Trainer, TrainerCallback
from transformers.utils import logging as hf_logging

ROOT = Path(__file__).resolve().parent.parent
SAME_WORK = [
    *("data.eval=null", "training.use_cpu=true", "training.train_sampling_strategy=sequential"),
    *(f"training.{what}_strategy='no'" for what in ("logging", "eval", "save")),
]
TINY = ["student.model=code-student-tiny", "teacher.model=code-teacher-tiny"]
ENVIRONMENT = {
    **{"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
    **{"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1", "CUDA_VISIBLE_DEVICES": ""},
}
GATE, SAME = 1.0, 1e-3


def kdlm(recipe: Any) -> Trainer:
    from kdlm.train import assemble

    return assemble(recipe).trainer


def gkd(recipe: Any) -> Trainer:
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    models, data = ingredients(recipe)
    args = GKDConfig(**settings(recipe), beta=0.0, lmbda=0.0)
    return GKDTrainer(**models, args=args, train_dataset=data.train, data_collator=data.collator)


def distillation(recipe: Any) -> Trainer:
    from trl import DistillationConfig, DistillationTrainer

    models, data = ingredients(recipe)

    class OnGivenText(DistillationTrainer):
        def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
            batch = data.collator(inputs)
            ids, mask = batch["input_ids"], batch["attention_mask"]
            return {
                "prompt_ids": ids[:, :1],
                "prompt_mask": mask[:, :1],
                "completion_ids": ids[:, 1:],
                "completion_mask": mask[:, 1:],
                "num_items_in_batch": mask[:, 1:].sum(),
            }

    args = DistillationConfig(**settings(recipe), beta=0.0, shuffle_dataset=False)
    return OnGivenText(**models, args=args, train_dataset=data.train)


TRAINERS: dict[str, Callable[[Any], Trainer]] = {"kdlm": kdlm, "GKDTrainer": gkd, "DistillationTrainer": distillation}


def ingredients(recipe: Any) -> tuple[dict[str, Any], Any]:
    """Return the models and the tokenizer under TRL's names for them, and the data: all as kdlm opens them."""
    from kdlm.data import load_data

    tokenizer = recipe.student.tokenizer()
    models = {"model": recipe.student.load(), "teacher_model": recipe.teacher.load(), "processing_class": tokenizer}
    return models, load_data(recipe.data, tokenizer, seed=recipe.seed)


def settings(recipe: Any) -> dict[str, Any]:
    """Return the recipe's training arguments for a TRL config, and off what TRL switches on by itself."""
    given = recipe.training.model_dump(exclude_unset=True)
    own = {"output_dir": str(recipe.run_dir), "seed": recipe.seed, "report_to": "none", "disable_tqdm": True}
    return given | own | {"bf16": False, "gradient_checkpointing": False}


class Clock(TrainerCallback):
    """Notes the ends of all steps, how much of each was not spent in the networks, and the first step's loss."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.ends: list[tuple[float, float]] = []  # wall clock, processor time
        self.inside: list[float] = []
        self.began, self.first_loss = 0.0, float("nan")

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.began = time.perf_counter()

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.inside.append(time.perf_counter() - self.began)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            self.first_loss = self.trainer._tr_loss.item()
        self.ends.append((time.perf_counter(), time.process_time()))


def note_counts(trainer: Trainer) -> list[Any]:
    """Return a list to which the trainer's loss adds what it divides by, step by step."""
    compute, counts = trainer.compute_loss, []

    def compute_loss(model: Any, inputs: dict[str, Any], *args: Any, num_items_in_batch: Any, **kwargs: Any) -> Any:
        count = inputs.get("num_items_in_batch", num_items_in_batch)
        counts.append(count["tokens"] if isinstance(count, dict) else count)
        return compute(model, inputs, *args, num_items_in_batch=num_items_in_batch, **kwargs)

    trainer.compute_loss = compute_loss
    return counts


def point(which: str, overrides: list[str]) -> dict[str, Any]:
    """Train once; runs in its own process."""
    import torch

    from kdlm.recipe import load

    torch.set_num_threads(1)
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        recipe = load(ROOT / "recipes" / "quickstart.yaml", [*SAME_WORK, *overrides, f"run_dir={folder}"])
        torch.manual_seed(recipe.seed)
        trainer = TRAINERS[which](recipe)
        counts = note_counts(trainer)
        clock = Clock(trainer)
        trainer.add_callback(clock)
        outcome = trainer.train()
    wall, cpu = ([later - sooner for sooner, later in pairwise(column)] for column in zip(*clock.ends, strict=True))
    optimizer: Any = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    return {
        "optimizer": f"{type(optimizer).__name__}, fused={bool(optimizer.defaults.get('fused'))}",
        "first_loss": clock.first_loss,
        "mean_loss": outcome.training_loss,
        "tokens": [int(count) for count in counts],
        "seconds": wall,
        "cpu_seconds": cpu,
        "outside": [step - inside for step, inside in zip(wall, clock.inside[1:], strict=True)],
    }


def measure(which: str, quick: bool) -> dict[str, Any]:
    command = [sys.executable, __file__, "--point", which, *(["--quick"] if quick else [])]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | ENVIRONMENT)
    if done.returncode:
        sys.exit(f"{which} ended with {done.returncode}\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def summary(runs: list[dict[str, Any]], warm_up: int) -> dict[str, Any]:
    """Return one trainer's figures: the median of each step over the repetitions, summed over the steps."""
    first, tokens = runs[0], sum(runs[0]["tokens"][warm_up:])

    def steps(key: str) -> list[float]:
        """Return the median of each step; the first step has no start that was noted."""
        return [median(times) for times in zip(*(run[key][warm_up - 1 :] for run in runs), strict=True)]

    return {
        "tokens_per_second": tokens / sum(steps("seconds")),
        "ms_per_step": 1e3 * fmean(steps("seconds")),
        "cpu_ms_per_step": 1e3 * fmean(steps("cpu_seconds")),
        "outside_ms_per_step": 1e3 * fmean(steps("outside")),
        "runs_tokens_per_second": [tokens / sum(run["seconds"][warm_up - 1 :]) for run in runs],
        **{key: first[key] for key in ("first_loss", "mean_loss", "optimizer")},
    }


def check_same_work(runs: dict[str, list[dict[str, Any]]]) -> None:
    """Exit where the trainers did not do the same: their speeds would not compare."""
    ours = runs["kdlm"][0]
    for name, others in runs.items():
        for other in others:
            if other["tokens"] != ours["tokens"]:
                sys.exit(f"{name} trained on {sum(other['tokens'])} tokens, kdlm on {sum(ours['tokens'])}")
            if other["optimizer"] != ours["optimizer"]:
                sys.exit(f"{name} steps with {other['optimizer']}, kdlm with {ours['optimizer']}")
            for key in ("first_loss", "mean_loss"):
                if abs(other[key] - ours[key]) > SAME * abs(ours[key]):
                    sys.exit(f"{name}: {key} {other[key]:.6f}, kdlm's is {ours[key]:.6f}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny models, few steps: a smoke test")
    parser.add_argument("--check", action="store_true", help="exit 1 when kdlm is slower than the better TRL trainer")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/train_throughput_cpu.json")
    parser.add_argument("--repeats", type=int, help="runs of each trainer (default: 5, quick: 2)")
    parser.add_argument("--point", choices=TRAINERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    steps, warm_up = (16, 4) if args.quick else (60, 10)
    overrides = [f"training.max_steps={steps}", *(TINY if args.quick else [])]
    if args.point:
        print(json.dumps(point(args.point, overrides)))
        return 0
    from kdlm.sandbox import build

    for name in ("code", *(f"code-{role}{'-tiny' * args.quick}" for role in ("student", "teacher"))):
        build(name)  # here, where its progress shows
    repeats = args.repeats or (2 if args.quick else 5)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in TRAINERS}
    for number in range(repeats):
        for name in TRAINERS:
            runs[name].append(measure(name, args.quick))
            print(f"run {number + 1}/{repeats}  {name}", flush=True)
    check_same_work(runs)
    found = {name: summary(results, warm_up) for name, results in runs.items()}
    print(f"{'':<20}{'tokens/s':>10}{'ms/step':>9}{'cpu ms':>9}{'outside ms':>12}{'first loss':>12}{'mean loss':>11}")
    for name, row in found.items():
        print(
            f"{name:<20}{row['tokens_per_second']:>10,.0f}{row['ms_per_step']:>9.2f}{row['cpu_ms_per_step']:>9.2f}"
            f"{row['outside_ms_per_step']:>12.2f}{row['first_loss']:>12.6f}{row['mean_loss']:>11.6f}"
        )
    print("cpu: processor time, below ms/step where the machine had other work; outside: not in the networks' step")
    best = max((name for name in found if name != "kdlm"), key=lambda name: found[name]["tokens_per_second"])
    ratio = found["kdlm"]["tokens_per_second"] / found[best]["tokens_per_second"]
    if args.save:
        save({"figure": ratio, "better": best, "steps": steps, "warm_up": warm_up, "repeats": repeats, **found})
    print(f"kdlm trains {ratio:.3f} times as many tokens/s as TRL's {best}, the better of the two (gate: {GATE})")
    return int(args.check and ratio < GATE)


def save(results: dict[str, Any]) -> None:
    from machine import described

    path = ROOT / "benchmarks" / "results" / "train_throughput_cpu.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"machine": described(), "threads": 1, **results}, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
