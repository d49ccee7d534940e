"""Encoders: does a teacher's inside help a student of half its width, every stage of ERNIE-Tiny, and class_kd?

    python benchmarks/encoder_distillation.py [--check] [--quick] [--save] [--stages | --classes]

Masked language models of sums (`sandbox:masked-teacher`, right in 0.998 of held-out sums): a student of as many layers
and heads and half the width learns to fill in digits, at equal steps and with equal digits hidden: from the text alone,
from the teacher's probabilities (plain KD), and from these with MiniLM v2's relations beside it, or with TinyBERT's
attention scores, hidden states and embeddings (the weights of kdlm: scores 0.1, the rest 1; all 1; scores alone), or by
TinyBERT's own schedule: half of the steps the inside alone, all weights 1, the other half plain KD. Figures are the
accuracy at hidden digits of held-out sums, of which the same are hidden for all, the bound on the negative
log-likelihood in nats a token, and the terms of the loss on held-out sums before and after (each phase). Three seeds,
of weights and order.

--stages runs ERNIE-Tiny instead (recipes/sandbox/ernie_tiny, fewer steps): its teacher once, and for each seed all four
stages, the same without the first, the second or the third, and the fourth alone. A stage that is left out is not made
up for by more steps of another. Figures are the accuracy of the tens digit of held-out sums.

--classes runs recipes/sandbox/text_classification.yaml instead: its teacher once, and for each seed the student from
the labels alone and beside the teacher. Figures are the accuracy on held-out pieces of code, of eight modules.

--check exits 1 unless, in the mean over seeds, MiniLM and TinyBERT (the weights of kdlm) beside plain KD have at least
the accuracy of plain KD; unless all four stages have at least that of the last alone; unless the student beside its
teacher has at least that of the student alone. --quick takes a few steps and one seed: a smoke test, which gates
nothing but that all figures are numbers. --save writes the figures to benchmarks/results, as encoder_distillation.json,
encoder_stages.json or encoder_classes.json, after every arm; a file that a stopped run left (its `met` is null) is gone
on with, a finished one begun anew. Seeds run side by side, one thread each.
"""

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SANDBOX = ROOT / "recipes" / "sandbox"
STAGES = SANDBOX / "ernie_tiny"
ARMS = (
    "text alone",
    "plain KD",
    "MiniLM, KD",
    "TinyBERT, KD",
    "TinyBERT, scores 1, KD",
    "TinyBERT's scores, KD",
    "TinyBERT, then KD",
)
CLASSES = ("labels alone", "class_kd")
PLANS = {
    "all four": ("general", "general_enhanced", "task_adaptive", "task_specific"),
    "without the first": ("general_enhanced", "task_adaptive", "task_specific"),
    "without the second": ("general", "task_adaptive", "task_specific"),
    "without the third": ("general", "general_enhanced", "task_specific"),
    "the last alone": ("task_specific",),
}
SIZES = "{num_hidden_layers: 2, num_attention_heads: 4, num_key_value_heads: 4}"
STUDENT = f"name: text_classifier, path: 'sandbox:masked-student', sizes: {SIZES}, num_labels: 10"
BRIEF = ["training.eval_strategy='no'", "training.save_strategy='no'", "training.logging_steps=1000"]


def phases_of(arm: str, steps: int) -> list[tuple[Any, int]]:
    """Return the methods of an arm, and how many steps each has."""
    from kdlm.losses import CrossEntropy, ForwardKL
    from kdlm.methods import MaskedKD, MiniLM, TinyBERT

    kl = ForwardKL()
    methods: dict[str, Any] = {
        "text alone": MaskedKD([CrossEntropy()]),
        "plain KD": MaskedKD([kl]),
        "MiniLM, KD": MiniLM([kl], relation_heads=4),
        "TinyBERT, KD": TinyBERT([kl]),
        "TinyBERT, scores 1, KD": TinyBERT([kl], attention=1.0),
        "TinyBERT's scores, KD": TinyBERT([kl], hidden=0.0, embeddings=0.0),
    }
    if arm in methods:
        return [(methods[arm], steps)]
    return [(TinyBERT(attention=1.0), steps // 2), (MaskedKD([kl]), steps - steps // 2)]


def sums(seed: int) -> Any:
    from kdlm.data import DataSection, Source, load_data
    from kdlm.models import MaskedLanguageModel

    source, held_out = (Source(path=f"sandbox:sums/{name}") for name in ("train", "eval"))
    tokenizer = MaskedLanguageModel(path="sandbox:masked-teacher").tokenizer()
    return load_data(DataSection(train=[source], eval=[held_out], max_length=16), tokenizer, seed=seed), tokenizer


def filled_in(folder: Path, steps: int, arm: str, seed: int) -> dict[str, Any]:
    """Train a student; return its accuracy at hidden digits, its bound, and the terms of its loss before and after."""
    import torch
    from transformers import TrainingArguments

    from kdlm import DistillTrainer
    from kdlm.models import MaskedLanguageModel
    from kdlm.sandbox.language_models import Shape
    from kdlm.sandbox.masked_language_models import masked_model

    data, tokenizer = sums(seed)
    torch.manual_seed(seed)
    student, terms, found = masked_model(Shape(width=48, layers=2, heads=4, feed_forward=96), tokenizer), [], {}
    for number, (method, count) in enumerate(phases_of(arm, steps)):
        args = TrainingArguments(
            output_dir=str(folder / f"{ARMS.index(arm)}-{seed}"), max_steps=count, per_device_train_batch_size=128,
            learning_rate=3e-3, seed=seed + 100 * number, lr_scheduler_type="cosine", warmup_steps=20,
            per_device_eval_batch_size=500, report_to="none", use_cpu=True, save_strategy="no", disable_tqdm=True,
            logging_steps=10**6,
        )  # fmt: skip
        trainer = DistillTrainer(
            student, MaskedLanguageModel(path="sandbox:masked-teacher").load(), args, method=method,
            train_dataset=data.train, eval_dataset=data.eval, data_collator=data.collator, processing_class=tokenizer,
        )  # fmt: skip
        terms.append(terms_of(trainer.evaluate()))
        trainer.train()
        terms.append(terms_of(figures := trainer.evaluate()))
        found = {"accuracy": accuracy(trainer, data), "bound": figures["eval_cross_entropy"]}
    return found | {"terms": terms}


def terms_of(figures: dict[str, float]) -> dict[str, float]:
    names = ("forward_kl", "attention", "hidden", "embeddings")
    return {name: figures[key] for name in names if (key := f"eval_{name}") in figures}


def accuracy(trainer: Any, data: Any) -> float:
    """Return the share of hidden digits of held-out sums that the student's likeliest token is; one draw for all."""
    import torch

    from kdlm.methods.masked.masking import EVALUATION, Texts, masked

    texts = Texts.of(data.collator([data.eval[i] for i in range(len(data.eval))]))
    view = trainer.networks.views["student"]
    seen = masked(texts, texts.hidden(0, EVALUATION), view.mask_id)
    trainer.networks.eval()
    with torch.no_grad():
        signal = view(seen.batch, seen.rows)
    return (signal.head.logits(signal.hidden).argmax(-1) == seen.rows.labels).double().mean().item()


def trained(recipe: Path, changes: list[str], folder: Path) -> Path:
    from kdlm.recipe import load
    from kdlm.train import train

    return train(load(recipe, [*BRIEF, *changes, f"run_dir={folder}"]))


def staged(folder: Path, steps: int, tuned: Path, plan: str, seed: int) -> dict[str, Any]:
    """Take a student through the stages of a plan, `steps` each."""
    student = [f"student={{{STUDENT}, seed: {seed}}}"]
    left = tuned
    for stage in PLANS[plan]:
        taught = [] if stage == "general" else [f"teacher.path={tuned / 'student'}"]
        changes = [*student, *taught, f"seed={seed}", f"training.max_steps={steps}"]
        left = trained(STAGES / f"{stage}.yaml", changes, folder / f"{list(PLANS).index(plan)}-{seed}-{stage}")
        student = [f"student.path={left / 'student'}"]
    return {"accuracy": evaluated(left)}


def classified(folder: Path, steps: int, taught: Path, arm: str, seed: int) -> dict[str, Any]:
    """Train the student of the text classification recipe, from the labels alone or beside its teacher."""
    run = folder / f"{CLASSES.index(arm)}-{seed}"
    changes = [f"teacher.path={taught / 'student'}", f"seed={seed}", f"student.seed={seed}"]
    if arm == "labels alone":
        changes.append("losses=[{name: cross_entropy}]")
    return {
        "accuracy": evaluated(
            trained(SANDBOX / "text_classification.yaml", [*changes, f"training.max_steps={steps}"], run)
        )
    }


def evaluated(run: Path) -> float:
    return json.loads((run / "results.json").read_text())["eval_accuracy"]


def shown(values: list[float]) -> str:
    return "  ".join(f"{value:.3f}" for value in values)


def gathered(
    arms: Sequence[str],
    run: Callable[[str, int], dict[str, Any]],
    seeds: int,
    found: dict[str, Any],
    keep: Callable[[], None],
) -> None:
    """Put into `found` what every arm that is not there gives, its seeds side by side, and keep it after each."""
    with ProcessPoolExecutor(seeds, initializer=one_thread) as pool:
        for arm in arms:
            if arm not in found:
                runs = list(pool.map(partial(timed, run, arm), range(seeds)))
                found[arm] = {key: [one[key] for one in runs] for key in runs[0]}
                keep()
            print(f"  {arm:<24}{shown(found[arm]['accuracy'])}", flush=True)


def timed(run: Callable[..., dict[str, Any]], *chosen: Any) -> dict[str, Any]:
    before = time.process_time()
    found = run(*chosen)
    return found | {"cpu_seconds": round(time.process_time() - before, 1)}


def one_thread() -> None:
    import torch

    torch.set_num_threads(1)


def main() -> int:
    parser = argparse.ArgumentParser(description="Encoders: a teacher's inside beside KD")
    parser.add_argument("--check", action="store_true", help="exit 1 if a gate is missed")
    parser.add_argument("--quick", action="store_true", help="a few steps and one seed: a smoke test")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--stages", action="store_true", help="run ERNIE-Tiny's stages instead")
    which.add_argument("--classes", action="store_true", help="run the classifier of texts instead")
    parser.add_argument("--save", action="store_true", help="write the figures to benchmarks/results")
    args = parser.parse_args()
    one_thread()
    if args.stages:
        part, arms, full, gates = "stages", tuple(PLANS), 100, [("all four", "the last alone")]
    elif args.classes:
        part, arms, full, gates = "classes", CLASSES, 400, [("class_kd", "labels alone")]
    else:
        part, arms, full = "distillation", ARMS, 200
        gates = [("MiniLM, KD", "plain KD"), ("TinyBERT, KD", "plain KD")]
    seeds, steps = (1, 3) if args.quick else (3, full)
    saved = Saved(RESULTS / f"encoder_{part}.json", {"seeds": seeds, "steps": steps}, args.save)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        run: Any = partial(filled_in, folder, steps)
        if part != "distillation":
            recipe, count = (
                (STAGES / "finetuned.yaml", 3 * steps)
                if args.stages
                else (SANDBOX / "text_classification_teacher.yaml", steps)
            )
            before = time.process_time()
            teacher = trained(recipe, [f"training.max_steps={count}"], folder / "teacher")
            spent = round(time.process_time() - before, 1)
            saved.runs["the teacher"] = {"accuracy": [evaluated(teacher)], "cpu_seconds": [spent]}
            run = partial(staged if args.stages else classified, folder, steps, teacher)
        gathered(arms, run, seeds, saved.runs, saved.keep)
    means = {name: mean(rows["accuracy"]) for name, rows in saved.runs.items()}
    met = all(map(math.isfinite, means.values()))
    if not args.quick:
        met &= all(means[better] >= means[worse] for better, worse in gates)
    saved.keep(met)
    print(f"{cpu_seconds(saved.runs):.0f} s of one core")
    print("accuracy: " + ", ".join(f"{name} {value:.3f}" for name, value in means.items()))
    return 1 if args.check and not met else 0


def cpu_seconds(runs: dict[str, Any]) -> float:
    """Return the seconds of one core that runs took."""
    return sum(sum(one["cpu_seconds"]) for one in runs.values())


class Saved:
    """A file of results, written after each arm where `wanted`; one that a stopped run left is gone on with."""

    def __init__(self, path: Path, about: dict[str, Any], wanted: bool):
        self.path, self.about, self.wanted = path, about, wanted
        self.runs: dict[str, Any] = {}
        if wanted and path.is_file():
            left = json.loads(path.read_text())
            if left["met"] is None and about.items() <= left.items():
                self.runs = left["runs"]

    def keep(self, met: bool | None = None) -> None:
        if self.wanted:
            from machine import described

            about = {"machine": described(), **self.about, "cpu_seconds": cpu_seconds(self.runs), "met": met}
            text = json.dumps({**about, "runs": self.runs}, indent=1) + "\n"
            unfinished = self.path.with_suffix(".new")
            unfinished.write_text(text)
            unfinished.replace(self.path)


if __name__ == "__main__":
    sys.exit(main())
