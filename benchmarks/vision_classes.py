"""Image classification with few labels: how much of the way to the teacher does each method go?

    python benchmarks/vision_classes.py [--check] [--quick] [--save]

The 8 x 8 digits, 100 labels and 1,338 images without one. The teacher, a perceptron of three layers of 256, has learned
from all labels; students are of 64-8-8-10. Every arm trains five students through DistillTrainer with the same seeds,
steps, batches and rates as the others, so they are compared in pairs. "Gap closed" is (accuracy - that of
cross-entropy on the 100 labels) / (the teacher's - that of cross-entropy). Attention has no place on a perceptron: the
arm of attention transfer has convolutions of 8, 12 and 12 channels, a teacher of 16, 32 and 32, and cross-entropy on
the same student beside it. What a method adds is added to cross-entropy on the labels alone; no arm but KD has KD in
it.

PS-KD has no teacher, and a setting of its own: the 100 labelled images alone, epoch after epoch, compared with
cross-entropy on the same by the negative log-likelihood of held-out labels.

The last table has all labels, and is what not to use as a proof: nothing is left that a teacher could add, and the same
recipes tie with cross-entropy or lose to it.

--check exits 1 unless every method on logits closes half of the gap and wins at least four of five pairs, every method
on features closes 15 % and wins as often, and PS-KD has at most 0.97 of the negative log-likelihood at no more than a
point less accuracy. --quick trains two students for few steps: a smoke test that gates nothing. --save writes
benchmarks/results/vision_classes.json.
"""

import argparse
import gc
import json
import os
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
BASELINE = "cross-entropy"
LOGITS_GATE, FEATURES_GATE, WINS, NLL_GATE, ACCURACY_SLACK = 0.50, 0.15, 0.8, 0.97, 0.01
LABELS = 100


class Sizes(NamedTuple):
    """How much is trained."""

    seeds: int
    steps: int
    batch: int
    epochs: int  # of PS-KD


WHOLE, QUICK = Sizes(5, 800, 64, 200), Sizes(2, 12, 64, 2)


class Arm(NamedTuple):
    """A method to compare.

    Attributes:
        make: returns the method, fresh.
        gate: least share of the gap that it has to close.
        taught: whether it has the teacher.
    """

    make: Callable[[], Any]
    gate: float | None = LOGITS_GATE
    taught: bool = True


class Pair(NamedTuple):
    """A student, by its seed, and the teacher that it follows, which has so much accuracy."""

    student: Callable[[int], Any]
    teacher: Any
    ceiling: float
    learning_rate: float


def on_logits() -> dict[str, Arm]:
    """Return the baseline, and the methods that compare logits."""
    from kdlm.losses import DKD, NKD, OFA, CrossEntropy, ForwardKL, Linear
    from kdlm.methods import ImageKD

    warm_up = Linear(start=0.0, end=1.0, until=0.1)
    hard = CrossEntropy()
    return {
        BASELINE: Arm(lambda: ImageKD([hard]), gate=None, taught=False),
        "KD": Arm(lambda: ImageKD([CrossEntropy(weight=0.1), ForwardKL(weight=0.9, temperature=2.0)])),
        "DKD": Arm(lambda: ImageKD([hard, DKD(weight=warm_up)])),
        "NKD": Arm(lambda: ImageKD([hard, NKD(gamma=0.5)])),
        "OFA": Arm(lambda: ImageKD([hard, OFA(eps=1.5)])),
    }


def on_features() -> dict[str, Arm]:
    """Return the methods that compare features of perceptrons; OFA-KD has branches on them, and OFA on the logits."""
    from kdlm.losses import OFA, CrossEntropy
    from kdlm.methods import CRD, OFAKD, RKD, FitNet

    hard, last = CrossEntropy(), ("layers.1", "layers.2")
    stages = ["layers.0", "layers.1"]
    return {
        "FitNet": Arm(lambda: FitNet([hard], layers=[last], weight=1.0), FEATURES_GATE),
        "RKD": Arm(lambda: RKD([hard], layer=last), FEATURES_GATE),
        "CRD": Arm(lambda: CRD([hard], layer=last, width=16, temperature=0.2), FEATURES_GATE),
        "OFA-KD": Arm(lambda: OFAKD([hard, OFA(eps=1.5)], stages=stages, eps=1.5)),
    }


def on_maps() -> dict[str, Arm]:
    """Return the baseline, and attention transfer at the last two layers of a convolutional net."""
    from kdlm.losses import CrossEntropy
    from kdlm.methods import AttentionTransfer, ImageKD

    hard, layers = CrossEntropy(), [(f"layers.{i}",) * 2 for i in (1, 2)]
    return {
        BASELINE: Arm(lambda: ImageKD([hard]), gate=None, taught=False),
        "AT": Arm(lambda: AttentionTransfer([hard], layers=layers, weight=50.0), FEATURES_GATE),
    }


class Convolutions(nn.Module):
    """Three convolutions with SiLU, the second of stride 2, and a linear layer on the mean over places."""

    num_classes, image_shape = 10, (1, 8, 8)

    def __init__(self, widths: tuple[int, int, int]):
        super().__init__()
        sizes = zip((1, *widths), widths, (1, 2, 1), strict=False)
        self.layers = nn.Sequential(
            *(nn.Sequential(nn.Conv2d(a, b, 3, stride=stride, padding=1), nn.SiLU()) for a, b, stride in sizes)
        )
        self.classifier = nn.Linear(widths[-1], self.num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.layers(images).mean((2, 3)))


def convolutions(widths: tuple[int, int, int], seed: int) -> Convolutions:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Convolutions(widths)


def mlp(widths: list[int], seed: int) -> Any:
    from kdlm.models import ImageClassifierSource

    config = {"model_type": "mlp", "hidden_sizes": widths, "num_labels": 10}
    return ImageClassifierSource(config=config, seed=seed).load()


def digits(*, labelled: int | None = None, seed: int = 0) -> Any:
    """Return the digits' splits."""
    from kdlm.data import ImagesSection

    return ImagesSection(eval="sandbox:digits/eval", labelled=labelled, labelled_seed=seed).load(seed)


def trained(student: Any, teacher: Any, method: Any, data: Any, seed: int, folder: str, **length: Any) -> Any:
    """Train a student through DistillTrainer; return its figures on the evaluation split."""
    from transformers import PrinterCallback, TrainingArguments

    from kdlm import DistillTrainer

    settings: dict[str, Any] = {
        "learning_rate": 5e-3, "lr_scheduler_type": "cosine", "per_device_eval_batch_size": 512, "use_cpu": True,
        "logging_strategy": "no", "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }  # fmt: skip
    args = TrainingArguments(output_dir=folder, seed=seed, **settings | length)
    trainer = DistillTrainer(
        student, teacher, args, method=method, train_dataset=data.train, eval_dataset=data.eval
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    figures = trainer.evaluate()
    return {name: figures[f"eval_{name}"] for name in ("accuracy", "cross_entropy", "ece", "brier")}


def compared(
    arms: dict[str, Arm], pair: Pair, sizes: Sizes, folder: str, labelled: int | None
) -> dict[str, dict[str, Any]]:
    """Train every arm on every seed with so many labels (None: all); return what came of each."""
    found: dict[str, list[Any]] = {name: [] for name in arms}
    length = {"max_steps": sizes.steps, "per_device_train_batch_size": sizes.batch, "learning_rate": pair.learning_rate}
    for seed in range(sizes.seeds):
        data = digits(labelled=labelled, seed=seed)
        for name, arm in arms.items():
            teacher = pair.teacher if arm.taught else None
            found[name].append(trained(pair.student(seed), teacher, arm.make(), data, seed, folder, **length))
    return summary(found, pair.ceiling)


def progressive(sizes: Sizes, folder: str) -> dict[str, list[Any]]:
    """Return the figures of PS-KD and of cross-entropy on the labelled images alone."""
    from dataclasses import replace

    from kdlm.losses import IGNORE_INDEX, CrossEntropy
    from kdlm.methods import PSKD, ImageKD

    found: dict[str, list[Any]] = {BASELINE: [], "PS-KD": []}
    length = {"num_train_epochs": sizes.epochs, "per_device_train_batch_size": LABELS // 2}
    for seed in range(sizes.seeds):
        data = digits(labelled=LABELS, seed=seed)
        known = (data.train.columns["labels"] != IGNORE_INDEX).nonzero().flatten().tolist()
        data = replace(data, train=data.train.select(known))
        for name, method in ((BASELINE, ImageKD([CrossEntropy()])), ("PS-KD", PSKD())):
            found[name].append(trained(mlp([8, 8], seed), None, method, data, seed, folder, **length))
    return found


def summary(found: dict[str, list[Any]], ceiling: float) -> dict[str, dict[str, Any]]:
    """Return accuracy, share of the gap, wins over the baseline and the rest, of each arm."""
    start = [each["accuracy"] for each in found[BASELINE]]
    table = {}
    for name, figures in found.items():
        accuracy = [each["accuracy"] for each in figures]
        table[name] = {
            "accuracy": mean(accuracy),
            "spread": stdev(accuracy),
            "gap_closed": (mean(accuracy) - mean(start)) / max(ceiling - mean(start), 1e-9),
            "wins": sum(a > b for a, b in zip(accuracy, start, strict=True)),
            **{key: mean(each[key] for each in figures) for key in ("cross_entropy", "ece", "brier")},
        }
    return table


def show(title: str, table: dict[str, dict[str, Any]], seeds: int) -> None:
    print(f"\n{title}\n{'':14} accuracy          gap closed  wins   NLL    ECE    Brier")
    for name, row in table.items():
        print(
            f"{name:14} {row['accuracy']:.3f} ± {row['spread']:.3f}     {row['gap_closed']:6.1%}    "
            f"{row['wins']}/{seeds}   {row['cross_entropy']:.3f}  {row['ece']:.3f}  {row['brier']:.3f}"
        )


def verdict(few: dict[str, Any], maps: dict[str, Any], alone: dict[str, Any], seeds: int) -> dict[str, Any]:
    """Return what passed and what missed its gate."""
    missed = [
        name
        for arms, table in ((on_logits() | on_features(), few), (on_maps(), maps))
        for name, arm in arms.items()
        if arm.gate is not None and (table[name]["gap_closed"] < arm.gate or table[name]["wins"] < WINS * seeds)
    ]
    ratio = alone["PS-KD"]["cross_entropy"] / alone[BASELINE]["cross_entropy"]
    lost = alone[BASELINE]["accuracy"] - alone["PS-KD"]["accuracy"]
    if ratio > NLL_GATE or lost > ACCURACY_SLACK:
        missed.append("PS-KD")
    return {"missed": missed, "met": not missed, "nll_ratio": ratio}


def pairs(sizes: Sizes, folder: str) -> tuple[Pair, Pair]:
    """Return the perceptrons and the convolutional nets, each with a teacher trained on all labels."""
    from kdlm.losses import CrossEntropy
    from kdlm.methods import ImageKD

    length = {"max_steps": sizes.steps, "per_device_train_batch_size": sizes.batch}
    found = []
    for student, teacher, rate in (
        (partial(mlp, [8, 8]), mlp([256, 256, 256], 0), 5e-3),
        (partial(convolutions, (8, 12, 12)), convolutions((16, 32, 32), 0), 5e-3),
    ):
        figures = trained(teacher, None, ImageKD([CrossEntropy()]), digits(), 0, folder, **length)
        print(f"teacher: accuracy {figures['accuracy']:.3f}", flush=True)
        found.append(Pair(student, teacher, figures["accuracy"], rate))
    return found[0], found[1]


def measured(sizes: Sizes, folder: str) -> dict[str, dict[str, dict[str, Any]]]:
    """Train everything; return and show the tables by name."""
    dense, spatial = pairs(sizes, folder)
    tables = {"few_labels": compared(on_logits() | on_features(), dense, sizes, folder, LABELS)}
    show(f"{LABELS} labels, perceptrons", tables["few_labels"], sizes.seeds)
    tables["maps"] = compared(on_maps(), spatial, sizes, folder, LABELS)
    show(f"{LABELS} labels, convolutions", tables["maps"], sizes.seeds)
    tables["labelled_alone"] = summary(progressive(sizes, folder), dense.ceiling)
    show(f"{LABELS} labelled images alone", tables["labelled_alone"], sizes.seeds)
    tables["all_labels"] = compared(on_logits(), dense, sizes._replace(seeds=2), folder, None)
    show("all labels: what not to use as a proof", tables["all_labels"], 2)
    return tables


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="exit 1 if a gate is missed")
    parser.add_argument("--quick", action="store_true", help="two students and few steps: a smoke test")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/vision_classes.json")
    args = parser.parse_args()
    from transformers.utils import logging

    torch.set_num_threads(1)
    logging.set_verbosity_error()
    gc.freeze()  # every run collects garbage when it begins, and would look through all modules each time
    sizes = QUICK if args.quick else WHOLE
    with tempfile.TemporaryDirectory() as folder:
        tables = measured(sizes, folder)
    found = verdict(tables["few_labels"], tables["maps"], tables["labelled_alone"], sizes.seeds)
    seconds = sum(os.times()[:2])
    if args.save:
        sys.path.insert(0, str(ROOT / "benchmarks"))
        from machine import described

        about = {"machine": described(), "settings": {**sizes._asdict(), "labels": LABELS}, "cpu_seconds": seconds}
        path = ROOT / "benchmarks" / "results" / "vision_classes.json"
        path.write_text(json.dumps({**about, **found, **tables}, indent=1) + "\n")
    print(f"\n{seconds:.0f} s of one core; missed: {', '.join(found['missed']) or 'none'}")
    few = tables["few_labels"]
    least = min((few[name]["gap_closed"], name) for name in on_logits() if name != BASELINE)
    print(f"PS-KD's negative log-likelihood: {found['nll_ratio']:.3f} of cross-entropy's")
    print(f"gap to the teacher closed by the least of the methods on logits ({least[1]}): {least[0]:.0%}")
    return 1 if args.check and not args.quick and not found["met"] else 0


if __name__ == "__main__":
    sys.exit(main())
