"""Encoders: does a teacher's inside help a student of half its width, and does every stage of ERNIE-Tiny?

    python benchmarks/encoder_distillation.py [--check] [--quick] [--save] [--stages]

Masked language models of sums (`sandbox:masked-teacher`, right in 0.998 of held-out sums): a student of as many layers
and heads and half the width learns to fill in digits, at equal steps and with equal digits hidden: from the text alone,
from the teacher's probabilities (plain KD), and from these with MiniLM v2's relations or TinyBERT's attention scores
and hidden states beside it (weighed 0.01: they are some hundreds at first, in a model that normalises only what its
layers read) and embeddings. Figures are the accuracy at hidden digits of held-out sums, of which the same are
hidden for all, and the bound on the negative log-likelihood in nats a token. Three seeds, of weights and order.

--stages runs ERNIE-Tiny instead (recipes/sandbox/ernie_tiny, fewer steps): its teacher once, and for each seed all four
stages, the same without the first, the second or the third, and the fourth alone. A stage that is left out is not made
up for by more steps of another. Figures are the accuracy of the tens digit of held-out sums.

--check exits 1 unless MiniLM beside plain KD has in the mean over seeds at least the accuracy of plain KD (TinyBERT has
not, at the one weight that was tried), and unless all four stages have at least that of the last alone. --quick takes a
few steps and one seed: a smoke test, which gates nothing but that all figures are numbers. --save writes the figures to
benchmarks/results, as encoder_distillation.json or, with --stages, encoder_stages.json.
"""

import argparse
import json
import math
import os
import sys
import tempfile
from pathlib import Path
from statistics import mean
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
STAGES = ROOT / "recipes" / "sandbox" / "ernie_tiny"
ARMS = ("text alone", "plain KD", "MiniLM, KD", "TinyBERT, KD")
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


def method_of(arm: str) -> Any:
    from kdlm.losses import CrossEntropy, ForwardKL
    from kdlm.methods import MaskedKD, MiniLM, TinyBERT

    losses = [ForwardKL() if "KD" in arm else CrossEntropy()]
    if arm.startswith("MiniLM"):
        return MiniLM(losses, relation_heads=4)
    return TinyBERT(losses, attention=0.01, hidden=0.01) if arm.startswith("TinyBERT") else MaskedKD(losses)


def sums(seed: int) -> Any:
    from kdlm.data import DataSection, Source, load_data
    from kdlm.models import MaskedLanguageModel

    source, held_out = (Source(path=f"sandbox:sums/{name}") for name in ("train", "eval"))
    tokenizer = MaskedLanguageModel(path="sandbox:masked-teacher").tokenizer()
    return load_data(DataSection(train=[source], eval=[held_out], max_length=16), tokenizer, seed=seed), tokenizer


def filled_in(arm: str, seed: int, steps: int, folder: Path) -> dict[str, float]:
    """Train a student and return its accuracy at hidden digits and its bound."""
    import torch
    from transformers import TrainingArguments

    from kdlm import DistillTrainer
    from kdlm.models import MaskedLanguageModel
    from kdlm.sandbox.language_models import Shape
    from kdlm.sandbox.masked_language_models import masked_model

    data, tokenizer = sums(seed)
    torch.manual_seed(seed)
    student = masked_model(Shape(width=48, layers=2, heads=4, feed_forward=96), tokenizer)
    args = TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=128, learning_rate=3e-3, seed=seed,
        lr_scheduler_type="cosine", warmup_steps=20, per_device_eval_batch_size=500, report_to="none", use_cpu=True,
        save_strategy="no", disable_tqdm=True, logging_steps=10**6,
    )  # fmt: skip
    trainer = DistillTrainer(
        student, MaskedLanguageModel(path="sandbox:masked-teacher").load(), args, method=method_of(arm),
        train_dataset=data.train, eval_dataset=data.eval, data_collator=data.collator, processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    return {"accuracy": accuracy(trainer, data), "bound": trainer.evaluate()["eval_cross_entropy"]}


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


def arms(seeds: int, steps: int, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for arm in ARMS:
        runs = [filled_in(arm, seed, steps, folder / f"{ARMS.index(arm)}-{seed}") for seed in range(seeds)]
        found[arm] = {key: [run[key] for run in runs] for key in ("accuracy", "bound")}
        print(f"  {arm:<20}{shown(found[arm]['accuracy'])}   bound {shown(found[arm]['bound'])}", flush=True)
    return found


def trained(name: str, changes: list[str], folder: Path) -> Path:
    from kdlm.recipe import load
    from kdlm.train import train

    return train(load(STAGES / f"{name}.yaml", [*BRIEF, *changes, f"run_dir={folder}"]))


def stages(seeds: int, steps: int, folder: Path) -> dict[str, Any]:
    """Return the accuracy of every plan on every seed, `steps` a stage; the teacher has more, and one seed."""
    tuned = trained("finetuned", [f"training.max_steps={3 * steps}"], folder / "finetuned")
    found: dict[str, Any] = {"the teacher": {"accuracy": [evaluated(tuned)]}}
    for plan, chosen in PLANS.items():
        scores = []
        for seed in range(seeds):
            student = [f"student={{{STUDENT}, seed: {seed}}}"]
            for stage in chosen:
                taught = [] if stage == "general" else [f"teacher.path={tuned / 'student'}"]
                changes = [*student, *taught, f"seed={seed}", f"training.max_steps={steps}"]
                left = trained(stage, changes, folder / f"{list(PLANS).index(plan)}-{seed}-{stage}")
                student = [f"student.path={left / 'student'}"]
            scores.append(evaluated(left))
        found[plan] = {"accuracy": scores}
        print(f"  {plan:<20}{shown(scores)}", flush=True)
    return found


def evaluated(run: Path) -> float:
    return json.loads((run / "results.json").read_text())["eval_accuracy"]


def shown(values: list[float]) -> str:
    return "  ".join(f"{value:.3f}" for value in values)


def main() -> int:
    parser = argparse.ArgumentParser(description="Encoders: a teacher's inside beside KD")
    parser.add_argument("--check", action="store_true", help="exit 1 if a gate is missed")
    parser.add_argument("--quick", action="store_true", help="a few steps and one seed: a smoke test")
    parser.add_argument("--stages", action="store_true", help="run ERNIE-Tiny's stages instead")
    parser.add_argument("--save", action="store_true", help="write the figures to benchmarks/results")
    args = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    seeds, steps = (1, 3) if args.quick else (3, 100 if args.stages else 200)
    with tempfile.TemporaryDirectory() as folder:
        found = (stages if args.stages else arms)(seeds, steps, Path(folder))
    means = {name: mean(rows["accuracy"]) for name, rows in found.items()}
    better, worse = ("all four", "the last alone") if args.stages else ("MiniLM, KD", "plain KD")
    met = all(map(math.isfinite, means.values()))
    if not args.quick:
        met &= means[better] >= means[worse]
    cpu_seconds = sum(os.times()[:4])
    if args.save:
        from machine import described

        about = {"machine": described(), "seeds": seeds, "steps": steps, "cpu_seconds": cpu_seconds, "met": met}
        name = "encoder_stages" if args.stages else "encoder_distillation"
        (ROOT / "benchmarks" / "results" / f"{name}.json").write_text(
            json.dumps({**about, "runs": found}, indent=1) + "\n"
        )
    print(f"{cpu_seconds:.0f} s of one core")
    print("accuracy: " + ", ".join(f"{name} {value:.3f}" for name, value in means.items()))
    return 1 if args.check and not met else 0


if __name__ == "__main__":
    sys.exit(main())
