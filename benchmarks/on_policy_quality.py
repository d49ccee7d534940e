"""Does it pay to train a student on its own samples? Running totals, few solutions, equal steps and tokens.

    python benchmarks/on_policy_quality.py [--seeds 3] [--check] [--quick] [--save]

A problem is twelve digits, its solution their eleven running totals, a token each. It counts as solved when every total
is right, so one slip spoils it. There are 128 solved problems in all. A student of 24 thousand weights is fine-tuned on
them for 150 steps, and from there, at equal optimiser steps, prompts and (samples are as long as solutions once they
are well formed) tokens, goes on in five ways:

    SFT          cross-entropy on the 128 solutions
    KD           forward KL to the teacher on the 128 solutions: off-policy
    GKD          Jensen-Shannon divergence to the teacher on the student's own samples for the 128 prompts
    advantage    on its own samples, each token's advantage being the teacher's log-probability less the student's
    reverse KL   the whole divergence on its own samples

Each way's learning rate is the best of those tried on a seed that is not reported. That search, and the regimes where
the ways tie, are in docs/on_policy_quality.md.

--check exits 1 unless two claims hold of GKD and of reverse KL. The probe of exposure bias: on every seed KL between
student and teacher, in both directions, ends lower than KD's on the student's own samples. Accuracy: greedy decoding
solves at least as many unseen problems as KD's student on every seed, and more in the mean. The advantage sees one
token of a distribution at a time and is not far enough after so few steps: it is reported and not gated, and so is
accuracy at temperature 1. The figure, on the last line, is the least margin over KD in problems solved greedily.
--quick takes one seed and few steps and gates nothing. --save writes results/on_policy_quality.json here and the plot.
"""

import argparse
import copy
import json
import os
import random
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.utils.logging import disable_progress_bar

from kdlm import DistillTrainer, OnPolicyTrainer
from kdlm.data import Collator
from kdlm.losses import JSD, CrossEntropy, ForwardKL, ReverseKL, chunked, forward_kl, kept_rows, reverse_kl
from kdlm.methods import GKD, LogitKD, ReverseKLAdvantage, SequenceKD
from kdlm.models import Predictor
from kdlm.rollouts import GenerateEngine, GenerateSection, RolloutSection, Sampling, prompt_of
from kdlm.sandbox.language_models import Shape
from kdlm.sandbox.tasks import Split, Task, generate
from kdlm.signal import IGNORE_INDEX

ROOT = Path(__file__).resolve().parent.parent
DIGITS, SOLUTIONS, UNSEEN, BATCH = 12, 128, 256, 32
LONGEST = 2 * DIGITS  # tokens of a completion, twice a solution's
PAD, END, EQUALS, FIRST_NUMBER = range(4)
VOCABULARY = FIRST_NUMBER + 9 * DIGITS + 1
RATES = {"SFT": 5e-2, "KD": 5e-2, "GKD": 2e-2, "advantage": 2e-3, "reverse KL": 1e-2}
ON_POLICY = ("GKD", "advantage", "reverse KL")
GATED = ("GKD", "reverse KL")
KLS = ("own_forward_kl", "own_reverse_kl")
COLUMNS = ("greedy", "sampled", *KLS)

disable_progress_bar()
torch.set_num_threads(1)


class Plan(NamedTuple):
    """How long everything is trained, in optimiser steps."""

    teacher: int
    warm_up: int
    steps: int
    measured_every: int


WHOLE = Plan(teacher=600, warm_up=150, steps=240, measured_every=40)
QUICK = Plan(teacher=60, warm_up=20, steps=16, measured_every=8)


def running_totals(generator: random.Random, level: int) -> Task:
    """Return one problem: digits, and the totals of the first two, three ... of them."""
    digits = [generator.randrange(10) for _ in range(DIGITS)]
    totals = [sum(digits[: count + 1]) for count in range(1, DIGITS)]
    prompt, solution = f"{' '.join(map(str, digits))} =", " ".join(map(str, totals))
    return Task(prompt, solution, str(totals[-1]), level, "running totals")


def row_of(prompt: list[int], completion: list[int]) -> dict[str, Any]:
    return {"input_ids": prompt + completion, "labels": [IGNORE_INDEX] * len(prompt) + completion}


def problems(seed: int, count: int, split: Split = "train") -> list[dict[str, Any]]:
    """Return rows of different problems; no problem of one split is in the other."""
    rows = []
    for task in generate(running_totals, seed=seed, level=1, n=count, split=split):
        prompt = [*(FIRST_NUMBER + int(digit) for digit in task.prompt.split()[:-1]), EQUALS]
        solution = [*(FIRST_NUMBER + int(total) for total in task.completion.split()), END]
        rows.append(row_of(prompt, solution))
    return rows


def tokenizer() -> Any:
    """Return a tokenizer of one token a number."""
    words = ["<pad>", "<eos>", "=", *map(str, range(VOCABULARY - FIRST_NUMBER))]
    whole = Tokenizer(models.WordLevel(dict(zip(words, range(VOCABULARY), strict=True)), unk_token="<pad>"))
    whole.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=whole, eos_token="<eos>", pad_token="<pad>")


def network(width: int, heads: int, seed: int) -> Any:
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(Shape(width, 2, heads, 2 * width).config(VOCABULARY, END, PAD))


def trained(model: Any, rows: Any, steps: int, rate: float, seed: int, **options: Any) -> Any:
    """Train the model in place; by default by cross-entropy on the rows' solutions."""
    options = {"method": SequenceKD([CrossEntropy()]), "teacher": None, **options}
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            report_to="none",
            use_cpu=True,
            max_steps=steps,
            per_device_train_batch_size=options.pop("batch", BATCH),
            learning_rate=rate,
            lr_scheduler_type=options.pop("schedule", "cosine"),
            warmup_steps=max(1, steps // 20),
            adam_beta2=0.98,
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            seed=seed,
        )
        kind = OnPolicyTrainer if "rollouts" in options else DistillTrainer
        options |= {"train_dataset": rows, "processing_class": tokenizer(), "data_collator": Collator(PAD)}
        trainer = kind(model, args=arguments, **options)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        trainer.close()
    return model


def measured(student: Any, teacher: Any, rows: list[dict[str, Any]]) -> dict[str, float]:
    """Return the share of problems solved, and KL in nats a token on the student's samples and on the solutions."""
    engine = GenerateEngine([END], PAD, batch_size=len(rows))
    engine.take(student, 0)
    prompts = [prompt_of(row, None) for row in rows]
    found, own = {}, []
    for name, temperature in (("greedy", 0.0), ("sampled", 1.0)):
        drawn = engine.generate(prompts, Sampling(temperature=temperature, max_new_tokens=LONGEST), seed=7)
        own = [row_of(prompt, one.ids) for prompt, one in zip(prompts, drawn, strict=True)]
        found[name] = fmean(ours == row for ours, row in zip(own, rows, strict=True))
    found["own_length"] = fmean(len(one.ids) for one in drawn)
    for name, texts in (("own", own), ("solution", rows)):
        batch = Collator(PAD)(texts)
        kept = kept_rows(batch["labels"])
        with torch.no_grad():
            ours, theirs = Predictor(student)(batch, kept), Predictor(teacher)(batch, kept)
            found[f"{name}_forward_kl"] = chunked(forward_kl, ours, theirs).mean().item()
            found[f"{name}_reverse_kl"] = chunked(reverse_kl, ours, theirs).mean().item()
    return found


def ways(teacher: Any) -> dict[str, dict[str, Any]]:
    """Return the trainer's options of each way."""
    engine = GenerateSection(batch_size=4 * BATCH)
    rollouts = RolloutSection(engine=engine, sampling=Sampling(max_new_tokens=LONGEST), every=4)
    own = {"teacher": teacher, "rollouts": rollouts}
    return {
        "SFT": {"method": SequenceKD([CrossEntropy()])},
        "KD": {"method": LogitKD([ForwardKL()]), "teacher": teacher},
        "GKD": {"method": GKD([JSD()], student_share=1.0), **own},
        "advantage": {"method": ReverseKLAdvantage(), **own},
        "reverse KL": {"method": GKD([ReverseKL()], student_share=1.0), **own},
    }


def measure(plan: Plan, folder: Path, seed: int) -> list[dict[str, Any]]:
    """Train the students of one seed, on one thread, and return a row for each with its curve."""
    teacher = Qwen3ForCausalLM.from_pretrained(folder).eval().requires_grad_(False)
    solved, unseen = problems(10 + seed, SOLUTIONS), problems(1, UNSEEN, "eval")
    start = trained(network(32, 2, seed), solved, plan.warm_up, 5e-3, seed, batch=64, schedule="constant_with_warmup")

    class Curve(TrainerCallback):
        def __init__(self) -> None:
            self.student = copy.deepcopy(start)
            self.points = [{"step": 0, **measured(start, teacher, unseen)}]

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step % plan.measured_every == 0:
                self.points.append({"step": state.global_step, **measured(self.student, teacher, unseen)})

    rows = []
    for name, options in ways(teacher).items():
        curve = Curve()
        trained(curve.student, solved, plan.steps, RATES[name], seed, callbacks=[curve], **options)
        rows.append({"way": name, "seed": seed, **curve.points[-1], "curve": curve.points})
        print(f"  {name}, seed {seed}: {rows[-1]['greedy']:.3f} solved", flush=True)
    return rows


def make_teacher(plan: Plan, folder: Path) -> dict[str, float]:
    """Train the teacher, write it, and return what it is worth."""
    teacher = trained(network(96, 4, 0), problems(2, 20_000), plan.teacher, 3e-3, 0, batch=64)
    teacher.save_pretrained(folder)
    return measured(teacher, teacher, problems(1, UNSEEN, "eval"))


def margins(rows: list[dict[str, Any]], way: str, key: str) -> list[float]:
    """Return by how much a way ends above KD, seed by seed."""
    ends = {(row["way"], row["seed"]): row[key] for row in rows}
    return [ends[way, seed] - ends["KD", seed] for seed in sorted({row["seed"] for row in rows})]


def verdicts(rows: list[dict[str, Any]]) -> dict[str, bool]:
    """Return which claims hold."""
    gains = [margins(rows, way, "greedy") for way in GATED]
    return {
        "nearer_on_own_samples": all(max(margins(rows, way, key)) < 0 for way in GATED for key in KLS),
        "at_least_as_accurate": all(min(gain) >= 0 and fmean(gain) > 0 for gain in gains),
    }


def show(rows: list[dict[str, Any]]) -> None:
    for seed in sorted({row["seed"] for row in rows}):
        mine = [row for row in rows if row["seed"] == seed]
        print(f"seed {seed:<8}{''.join(f'{name:>22}' for name in COLUMNS)}")
        for row in [{"way": "start", **mine[0]["curve"][0]}, *mine]:
            print(f"  {row['way']:<11}{''.join(f'{row[column]:>22.3f}' for column in COLUMNS)}")
    for way, key in product(ON_POLICY, COLUMNS):
        print(f"{way} less KD, {key}: {', '.join(f'{value:+.3f}' for value in margins(rows, way, key))}")


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 4.4))
    colours = dict(zip(RATES, ("tab:gray", "tab:blue", "tab:green", "tab:red", "tab:orange"), strict=True))
    shown = {
        "greedy": "unseen problems solved, greedy",
        "sampled": "unseen problems solved, temperature 1",
        "own_reverse_kl": "KL(student || teacher), own samples (nats a token)",
    }
    for axis, (key, label) in zip(figure.subplots(1, 3), shown.items(), strict=True):
        for row in rows:
            steps, values = zip(*((point["step"], point[key]) for point in row["curve"]), strict=True)
            axis.plot(steps, values, color=colours[row["way"]], label=row["way"] if row["seed"] == 0 else None)
        axis.set(xlabel="optimiser step", ylabel=label)
        axis.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def save(plan: Plan, rows: list[dict[str, Any]], teacher: dict[str, float], found: dict[str, bool]) -> None:
    from machine import described

    settings = {**plan._asdict(), "digits": DIGITS, "solutions": SOLUTIONS, "batch": BATCH, "learning_rates": RATES}
    gains = {way: {key: margins(rows, way, key) for key in COLUMNS} for way in ON_POLICY}
    result = {"machine": described(), "settings": settings, "teacher": teacher, **found, "margins_over_kd": gains}
    path = ROOT / "benchmarks" / "results" / "on_policy_quality.json"
    path.write_text(json.dumps({**result, "runs": rows}, indent=1) + "\n")
    plot(rows, ROOT / "docs" / "on_policy_quality.png")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds (default: %(default)s)")
    parser.add_argument("--check", action="store_true", help="exit 1 if the gate is missed")
    parser.add_argument("--quick", action="store_true", help="16 steps, one seed; no gate")
    parser.add_argument("--save", action="store_true", help="write the results and the plot")
    args = parser.parse_args()
    plan, seeds = (QUICK, 1) if args.quick else (WHOLE, args.seeds)
    began = time.perf_counter()
    pool = ProcessPoolExecutor(os.cpu_count(), get_context("spawn"))
    with tempfile.TemporaryDirectory() as name, pool:
        teacher = pool.submit(make_teacher, plan, Path(name)).result()
        print(f"teacher: {teacher['greedy']:.3f} solved, {teacher['sampled']:.3f} at temperature 1", flush=True)
        rows = [row for found in pool.map(partial(measure, plan, Path(name)), range(seeds)) for row in found]
    show(rows)
    found = verdicts(rows)
    print("; ".join(f"{claim.replace('_', ' ')}: {'yes' if holds else 'NO'}" for claim, holds in found.items()))
    if args.save:
        save(plan, rows, teacher, found)
    print(f"{time.perf_counter() - began:.0f} s")
    least = min(gain for way in GATED for gain in margins(rows, way, "greedy"))
    print(f"least margin over KD in problems solved, of GKD and reverse KL: {least:+.3f}")
    return 1 if args.check and not args.quick and not all(found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
