"""Dataset distillation: how much of the digits is left in one image of each?

    python benchmarks/dataset_distillation.py [--check] [--quick] [--save]

The recipes of recipes/dataset each learn one 8 x 8 image for every digit, for three seeds: other real images to begin
with, other experts, other networks. A fifth of the training images is kept back, by which the best of a run's sets is
chosen; figures are accuracies on the 359 test images, which nothing has seen. Three networks train on every set, all in
the same way. Beside the learned sets stand real images drawn at random (five draws), the mean image of each digit, the
images that each run began with, and all training images.

The gap of a set is (its accuracy - that of random images) / (that of all images - that of random images). Class means
are no learning at all and close much of it already: a method's gain over them is printed too, and not gated. The second
architecture, a small ConvNet, is one that no set was learned for.

--check exits 1 unless the mean gap of every method is 40 % or more. --quick runs a few steps of one seed: a smoke test,
whose figures mean nothing and which gates nothing. --save writes benchmarks/results/dataset_distillation.json.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
METHODS = ("dm", "mtt", "ftd")
GATE, SEEDS, DRAWS, KEPT_BACK = 0.40, 3, 5, 5


class Parts(NamedTuple):
    """The digits in three: rows to learn from, rows to choose a set by, and images and labels to judge it by."""

    train: Any
    chosen_by: Any
    test: tuple[Any, Any]


def parts() -> Parts:
    """Return the digits; every fifth of the training images is kept back."""
    import torch

    from kdlm.data.images import ImagesSection

    data = ImagesSection(train="sandbox:digits/train", eval="sandbox:digits/eval").load(0)
    train: Any = data.train
    test: Any = data.eval
    back = range(0, len(train), KEPT_BACK)
    rest = [number for number in range(len(train)) if number % KEPT_BACK]
    shown = train.select(rest)
    shown.columns["index"] = torch.arange(len(rest))
    return Parts(shown, train.select(back), (test.columns["pixel_values"], test.columns["labels"]))


def learned(name: str, seed: int, folder: Path, given: Parts, quick: bool) -> dict[str, Any]:
    """Run a recipe on these parts; return its best set, the one it began with, and its last figures."""
    from transformers import PrinterCallback

    from kdlm import DistillTrainer
    from kdlm.data.collate import stacked
    from kdlm.recipe import load

    changes = [f"run_dir={folder}", f"seed={seed}", "training.use_cpu=true"]
    if quick:
        changes += ["training.max_steps=4", "training.eval_steps=2", "training.save_steps=2"]
    recipe = load(ROOT / "recipes" / "dataset" / f"{name}.yaml", changes)
    method: Any = recipe.method.build([], None)
    run = DistillTrainer(
        recipe.student.load_from(given.train, seed),
        None,
        recipe.training.build(output_dir=str(folder), seed=seed, disable_tqdm=True),
        method=method,
        train_dataset=given.train,
        eval_dataset=given.chosen_by,
        data_collator=stacked,
    )
    run.remove_callback(PrinterCallback)
    began = cpu_seconds()
    run.train()
    best = run.exported
    rates = [entry["inner_rate"] for entry in run.state.log_history if "inner_rate" in entry]
    return {
        "set": (best.pixel_values.detach(), best.labels),
        "start": (best.start, best.labels),
        "chosen_at_step": int(str(run.state.best_model_checkpoint).rpartition("-")[2]),
        "curve": {e["step"]: e["eval_accuracy"] for e in run.state.log_history if "eval_accuracy" in e},
        "matching": {e["step"]: e["loss"] for e in run.state.log_history if "loss" in e and e["step"] % 50 in (0, 10)},
        "learned_step_size": rates[-1] if rates else None,
        "cpu_seconds": cpu_seconds() - began,
    }


def judged(sets: dict[str, list[Any]], given: Parts, quick: bool) -> dict[str, dict[str, Any]]:
    """Return the test accuracy of each kind of set in two architectures: of every set, its mean over networks."""
    from kdlm.methods.dataset.augmentation import Augmentation
    from kdlm.methods.dataset.evaluation import Evaluation, accuracies
    from kdlm.methods.dataset.networks import MLP, ConvNet

    evaluation = Evaluation(steps=5, networks=1) if quick else Evaluation()
    found: dict[str, dict[str, Any]] = {}
    for kind, members in sets.items():
        found[kind] = {}
        for architecture in (MLP(), ConvNet()):
            each = accuracies(members, given.test, architecture, evaluation, Augmentation()).mean(-1).tolist()
            spread = statistics.stdev(each) if len(each) > 1 else 0.0
            found[kind][architecture.name] = {"mean": statistics.mean(each), "spread": spread, "each": each}
    return found


def cpu_seconds() -> float:
    """Return what this process has used: a busy machine leaves it nearly alone."""
    return sum(os.times()[:2])


def gap(found: dict[str, Any], kind: str, architecture: str = "mlp") -> float:
    """Return what a kind of set closes of the gap between random images and all of them; NaN where there is none."""
    accuracy, random, full = (found[each][architecture]["mean"] for each in (kind, "random", "all images"))
    return (accuracy - random) / (full - random) if full > random else float("nan")


def run(folder: Path, quick: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Learn all sets and judge them; return what was found of each kind, and how the runs went."""
    from kdlm.methods.dataset.evaluation import class_means, random_sets

    given = parts()
    images, labels = given.train.columns["pixel_values"], given.train.columns["labels"]
    sets: dict[str, list[Any]] = {"random": random_sets(images, labels, 1, DRAWS)}
    sets |= {"class means": [class_means(images, labels)], "all images": [(images, labels)], "start": []}
    runs: dict[str, Any] = {name: [] for name in METHODS}
    for name in METHODS:
        sets[name] = []
        for seed in range(1 if quick else SEEDS):
            one = learned(name, seed, folder / f"{name}-{seed}", given, quick)
            sets[name].append(one.pop("set"))
            start = one.pop("start")
            if name == METHODS[0]:  # all methods begin with the same images
                sets["start"].append(start)
            runs[name].append(one)
            print(f"{name}, seed {seed}: best at step {one['chosen_at_step']}, {one['cpu_seconds']:.0f} s", flush=True)
    return judged(sets, given, quick), runs


def table(found: dict[str, Any]) -> str:
    """Return the accuracies as lines of a table."""
    lines = ["| set | MLP | gap | ConvNet | gap |", "|---|---|---|---|---|"]
    for kind, figures in found.items():
        cells = [
            f"{figures[name]['mean']:.3f} ± {figures[name]['spread']:.3f} | {gap(found, kind, name):.0%}"
            for name in ("mlp", "convnet")
        ]
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="exit 1 if the gate is missed")
    parser.add_argument("--quick", action="store_true", help="a few steps of one seed: a smoke test")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/dataset_distillation.json")
    args = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found, runs = run(Path(folder), args.quick)
    gaps = {name: gap(found, name) for name in METHODS}
    met = min(gaps.values()) >= GATE
    if args.save:
        from machine import described

        settings = {"images_per_class": 1, "seeds": SEEDS, "random_draws": DRAWS, "gate": GATE}
        about = {"machine": described(), "settings": settings, "cpu_seconds": cpu_seconds()}
        path = ROOT / "benchmarks" / "results" / "dataset_distillation.json"
        path.write_text(json.dumps({**about, "gaps": gaps, "met": met, "sets": found, "runs": runs}, indent=1) + "\n")
    print(table(found))
    means = found["class means"]["mlp"]["mean"]
    print("over class means: " + ", ".join(f"{name} {found[name]['mlp']['mean'] - means:+.3f}" for name in METHODS))
    print(f"{cpu_seconds():.0f} s of one core")
    print("gap closed at one image of each class: " + ", ".join(f"{name} {each:.0%}" for name, each in gaps.items()))
    return 1 if args.check and not args.quick and not met else 0


if __name__ == "__main__":
    sys.exit(main())
