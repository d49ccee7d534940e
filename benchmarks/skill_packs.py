"""Packs: how much of what tuning gained is left at one eighth of the delta's bytes, and what several packs do together?

    python benchmarks/skill_packs.py [--check] [--quick] [--save]

The sandbox's teacher of code is fine-tuned in full on worked sums, and once more from the start on operations on
strings; it knows neither. Each difference is packed (`kdlm pack`), merged into a plain folder (`kdlm merge`) and opened
by transformers. What is kept is (base - packed) / (base - tuned), of the held-out loss on the task's answers.

Bytes are those of the whole pack folder, over those of all changed tensors in the checkpoint's own data type, which is
float32 here; an eighth of what they would be in bfloat16 is the second line of each table. Beside it, at the same
bytes: one rank for all tensors, factors in float32, no rounding.

Then two packs on one base, summed and routed, and fine-tuning transfer (arXiv 2503.20110): the sums' difference on the
base after further training on code.

--check exits 1 unless, on both tasks, the pack of an eighth keeps at least 95 % of the gain and `--rank full` gives the
tuned weights back to 1e-5. --quick takes the tiny model and few steps: a smoke test, which gates the weights alone.
--save writes benchmarks/results/skill_packs.json.
"""

import argparse
import json
import os
import sys
import tempfile
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
RECIPE = ROOT / "recipes" / "sandbox" / "sums" / "teacher.yaml"
GATE, EXACT, SHARE = 0.95, 1e-5, 1 / 8
TASKS = ("arithmetic", "strings")


class Sizes(NamedTuple):
    """Who is tuned, for how many steps, and how many held-out rows are read."""

    model: str
    steps: int
    code_steps: int
    rows: int


WHOLE = Sizes("code-teacher", 100, 25, 80)
QUICK = Sizes("code-teacher-tiny", 4, 2, 4)


class Losses:
    """Held-out loss of a model on a task, in nats a token of its answers."""

    def __init__(self, sizes: Sizes, tokenizer: Any):
        from kdlm.data import DataSection, Source, load_data

        self.rows: dict[str, list[Any]] = {}
        for task in TASKS:
            section = DataSection(train=[Source(path=f"sandbox:{task}/eval", limit=sizes.rows)], max_length=256)
            read: Any = load_data(section, tokenizer).train
            self.rows[task] = list(read)

    def of(self, model: Any, task: str) -> float:
        import torch
        from torch.nn.functional import cross_entropy

        total = tokens = 0.0
        for row in self.rows[task]:
            labels = torch.tensor(row["labels"])[1:]
            with torch.no_grad():
                logits = model(input_ids=torch.tensor(row["input_ids"])[None]).logits[0, :-1]
            total += cross_entropy(logits, labels, ignore_index=-100, reduction="sum").item()
            tokens += (labels != -100).sum().item()
        return total / tokens

    def of_folder(self, folder: Path, task: str) -> float:
        return self.of(opened(folder), task)


def opened(folder: Path) -> Any:
    """Open a folder as anyone would, without kdlm."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


def tuned(sizes: Sizes, task: str, steps: int, folder: Path) -> Path:
    """Fine-tune the base on a task and return where it is."""
    from kdlm.recipe import load
    from kdlm.train import train

    changes = [f"student.model={sizes.model}", f"run_dir={folder}", f"training.max_steps={steps}"]
    changes += [f"data.train.0.path=sandbox:{task}/train", f"data.eval.0.path=sandbox:{task}/eval"]
    changes += ["training.learning_rate=1.0e-3", "training.eval_strategy='no'", "training.save_strategy='no'"]
    train(load(RECIPE, [*changes, "data.eval.0.limit=4"]))
    return folder / "student"


def merged(base: Path, parts: list[Path], folder: Path, **options: Any) -> Path:
    from kdlm.packs import merge

    merge(base, parts, folder, **options)
    return folder


def packed(base: Path, model: Path, folder: Path, **options: Any) -> dict[str, Any]:
    """Pack a model and merge it back; return folders, bytes and the error that the pack reports."""
    from kdlm.packs import Pack, pack

    pack(base, model, folder, **options)
    about = Pack(folder).about
    kinds = [kept.how.name if kept.how else "left out" for kept in about.deltas.values()]
    return {
        "folder": folder,
        "merged": merged(base, [folder], folder.with_name(f"{folder.name}-merged")),
        "bytes": sum(path.stat().st_size for path in folder.iterdir()),
        "delta_bytes": about.delta_bytes,
        "relative_error": about.relative_error,
        "kinds": {kind: kinds.count(kind) for kind in sorted(set(kinds))},
    }


def uniform(base: Path, model: Path, folder: Path, most: int) -> tuple[int, dict[str, Any]] | None:
    """Pack at the highest common rank, in float32, that takes no more than so many bytes; None where there is none."""
    found = None
    for rank in count(1):
        pack = packed(base, model, folder / f"rank-{rank}", rank=rank)
        if pack["bytes"] > most:
            return found
        found = rank, pack


def largest_difference(folder: Path, other: Path) -> float:
    first, second = opened(folder).state_dict(), opened(other).state_dict()
    return max((first[name] - second[name]).abs().max().item() for name in first)


def task_table(base: Path, model: Path, task: str, losses: Losses, folder: Path) -> dict[str, Any]:
    """Pack one skill in several ways and return what each keeps."""
    at = {"base": losses.of_folder(base, task), "tuned": losses.of_folder(model, task)}
    ways: dict[str, dict[str, Any]] = {}
    for name, share in (("1/8", SHARE), ("1/16 (1/8 of bfloat16)", SHARE / 2), ("1/32", SHARE / 4)):
        ways[name] = packed(base, model, folder / name.split()[0].replace("/", "-of-"), share=share)
        if found := uniform(base, model, folder / f"uniform-{name[:4].strip().replace('/', '-')}", ways[name]["bytes"]):
            ways[f"{name}, rank {found[0]} of every tensor in float32"] = found[1]
    ways["full rank"] = packed(base, model, folder / "full", rank="full")
    for name, way in ways.items():
        way["loss"] = losses.of_folder(way.pop("merged"), task)
        way["kept"] = (at["base"] - way["loss"]) / (at["base"] - at["tuned"])
        way["folder"] = str(way["folder"].name)
        figures = f"{way['bytes']:,} | {way['relative_error']:.3f} | {way['loss']:.4f} | {way['kept']:.2%}"
        print(f"| {task}, {name} | {figures} |", flush=True)
    exact = largest_difference(folder / "full-merged", model)
    print(f"{task}: base {at['base']:.4f}, tuned {at['tuned']:.4f}; full rank is {exact:.1e} from the tuned weights")
    return {**at, "ways": ways, "full_rank_largest_difference": exact}


def together(base: Path, models: dict[str, Path], folder: Path, losses: Losses) -> dict[str, dict[str, float]]:
    """Return the losses on both tasks of one skill, of both summed, and of both routed."""
    from kdlm.packs import Router

    packs = {task: folder / task / "1-of-8" for task in TASKS}
    table = {"base": {task: losses.of_folder(base, task) for task in TASKS}}
    for task, model in models.items():
        table[f"tuned on {task}"] = {each: losses.of_folder(model, each) for each in TASKS}
    for weight in (1.0, 0.7, 0.5):
        target = merged(base, list(packs.values()), folder / f"sum-{weight}", weights=[weight, weight])
        table[f"both packs, {weight:g} each"] = {task: losses.of_folder(target, task) for task in TASKS}
    router = Router(base, packs)
    table["routed"] = {task: losses.of(router(task).eval(), task) for task in TASKS}
    for name, row in table.items():
        print(f"| {name} | {' | '.join(f'{row[task]:.4f}' for task in TASKS)} |", flush=True)
    return table


def transferred(sizes: Sizes, base: Path, model: Path, folder: Path, losses: Losses) -> dict[str, float]:
    """Put the difference of one base on another, which was trained on, and return the losses on the first task."""
    newer = tuned(sizes, "code", sizes.code_steps, folder / "newer")
    moved = merged(newer, [model], folder / "moved", minus=base)
    found = {"newer base": losses.of_folder(newer, TASKS[0]), "transferred": losses.of_folder(moved, TASKS[0])}
    print(", ".join(f"{name} {loss:.4f}" for name, loss in found.items()))
    return found


def run(sizes: Sizes, folder: Path) -> dict[str, Any]:
    from kdlm.models import named

    source = named(f"sandbox:{sizes.model}")
    base, losses = Path(source.location()), Losses(sizes, source.tokenizer())
    models = {task: tuned(sizes, task, sizes.steps, folder / f"{task}-run") for task in TASKS}
    tasks = {task: task_table(base, model, task, losses, folder / task) for task, model in models.items()}
    both = together(base, models, folder, losses)
    return {"tasks": tasks, "together": both, "transfer": transferred(sizes, base, models[TASKS[0]], folder, losses)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="exit 1 if a gate is missed")
    parser.add_argument("--quick", action="store_true", help="the tiny model and few steps: a smoke test")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/skill_packs.json")
    args = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    sizes = QUICK if args.quick else WHOLE
    with tempfile.TemporaryDirectory() as folder:
        found = run(sizes, Path(folder))
    kept = min(task["ways"]["1/8"]["kept"] for task in found["tasks"].values())
    exact = max(task["full_rank_largest_difference"] for task in found["tasks"].values())
    met = exact <= EXACT and (kept >= GATE or args.quick)
    cpu_seconds = sum(os.times()[:4])
    if args.save:
        from machine import described

        about = {"machine": described(), "settings": {**sizes._asdict(), "share": SHARE}, "cpu_seconds": cpu_seconds}
        figures = {"kept": kept, "full_rank_largest_difference": exact, "met": met}
        path = ROOT / "benchmarks" / "results" / "skill_packs.json"
        path.write_text(json.dumps({**about, **figures, **found}, indent=1) + "\n")
    print(f"{cpu_seconds:.0f} s of one core")
    print(f"full rank gives the tuned weights back to {exact:.1e} (gate {EXACT:.0e})")
    print(f"kept of what tuning gained at an eighth of its bytes: {kept:.2%} (gate {GATE:.0%})")
    return 1 if args.check and not met else 0


if __name__ == "__main__":
    sys.exit(main())
