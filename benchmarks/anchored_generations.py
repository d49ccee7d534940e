"""Generations of students that teach each other: does an anchor on the base teacher keep them near it?

    python benchmarks/anchored_generations.py [--seeds 2] [--check] [--quick] [--save]

Generation 1 learns from the base teacher p_0. Generation n + 1, a fresh student, learns from (1 - a) p_n + a p_0: with
the anchor a = 0.3 (recipes/sandbox/generations/next.yaml), and without (a = 0: from generation n alone). Both lines
share generation 1, the seeds, the data, the steps and every initial student, so the target is all that differs. Each
generation is measured by KL(p_n || p_0) on held-out text, in nats a token: the direction that contracts geometrically
if every generation matches its target (arXiv 2601.13100; derived, see docs/many_teachers.md).

Two claims are looked at. The weaker: without the anchor the KL grows, and with it every generation from the second on
is nearer to the base, in the mean over seeds. --check exits 1 unless that holds. The stronger, that with the anchor the
fifth generation's KL is at most 1.05 times the first's, was the gate at first and does not hold here. The first
generation learns from p_0 alone, so its KL is the fitting error e of these short runs, and the floor that is derived
for an anchor, e / a, lies above it. It is reported and not gated.

--quick takes the tiny pair, few steps, one seed and three generations: a smoke test, whose figures mean nothing (that
base is little more than counts of tokens; in a run of 300 steps and three seeds some of its students, with the anchor
and without, had not got beyond those counts, and the lines could not be told apart). --save writes
benchmarks/results/anchored_generations.json.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
RECIPES = ROOT / "recipes" / "sandbox" / "generations"
ANCHOR, GENERATIONS, STEPS = 0.3, 5, 200
LEVEL = 1.05
"""How much larger a KL may be that is still called level."""


class Pair(NamedTuple):
    """Who teaches whom, for how long."""

    base: str
    student: str
    generations: int
    steps: int


WHOLE = Pair("code-teacher", "code-student", GENERATIONS, STEPS)
QUICK = Pair("code-teacher-tiny", "code-student-tiny", 3, 20)


def settings(pair: Pair, seed: int, generation: int) -> list[str]:
    """Return what the runs share: data, steps, and a student whose weights depend on seed and generation alone."""
    from kdlm.sandbox import build

    steps = pair.steps
    fresh = f"student={{name: fresh, config_from: '{build(pair.student)}', seed: {1000 * seed + generation}}}"
    return [
        *(fresh, f"seed={1000 * seed + generation}", f"training.max_steps={steps}", "training.use_cpu=true"),
        *("data.eval.0.limit=8", "training.eval_strategy='no'", "training.save_strategy='no'"),
        *(f"training.warmup_steps={steps // 10}", f"training.logging_steps={steps}"),
    ]


def generation_after(before: Path | None, anchor: float, pair: Pair, folder: Path, shared: list[str]) -> Path:
    """Train one generation and return the folder of its student."""
    from kdlm.recipe import load
    from kdlm.train import train

    name, changes = "first.yaml", [f"teacher.model={pair.base}"]
    if before is not None:
        name = "next.yaml"
        changes = [f"teacher.members.0.path={before}", f"teacher.members.1.model={pair.base}"]
        changes.append(f"teacher.weights=[{1 - anchor}, {anchor}]")
    return train(load(RECIPES / name, [*shared, *changes, f"run_dir={folder}"])) / "student"


def distances(students: Iterable[Path], base_model: str, rows: Any, collate: Any) -> list[dict[str, float]]:
    """Return each student's mean KL to the base teacher on held-out rows, both ways, in nats a token."""
    import torch
    from transformers import AutoModelForCausalLM

    from kdlm.losses import chunked, forward_kl, kept_rows, reverse_kl
    from kdlm.models import Predictor
    from kdlm.sandbox import build

    base = Predictor(AutoModelForCausalLM.from_pretrained(build(base_model)).eval())
    found = []
    for folder in students:
        student = Predictor(AutoModelForCausalLM.from_pretrained(folder).eval())
        sums, tokens = {"kl_to_base": 0.0, "kl_from_base": 0.0}, 0
        with torch.no_grad():
            for start in range(0, len(rows), 32):
                batch = collate([rows[i] for i in range(start, min(start + 32, len(rows)))])
                kept = kept_rows(batch["labels"])
                ours, theirs = student(batch, kept), base(batch, kept)
                sums["kl_to_base"] += chunked(reverse_kl, ours, theirs).sum().item()
                sums["kl_from_base"] += chunked(forward_kl, ours, theirs).sum().item()
                tokens += len(kept)
        found.append({name: total / tokens for name, total in sums.items()})
    return found


def measure(pair: Pair, seed: int) -> list[dict[str, Any]]:
    """Train both lines of one seed, on one thread, and return a row per line and generation."""
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        return lines(pair, seed, Path(folder))


def lines(pair: Pair, seed: int, folder: Path) -> list[dict[str, Any]]:
    """Train both lines below `folder`."""
    from kdlm.data import load_data
    from kdlm.recipe import load

    shared = settings(pair, seed, 1)
    recipe = load(RECIPES / "first.yaml", [*shared, f"teacher.model={pair.base}"])
    data = load_data(recipe.data, recipe.student.tokenizer())
    first = generation_after(None, 0.0, pair, folder / "first", shared)
    rows = []
    for anchor in (ANCHOR, 0.0):
        students = [first]
        for generation in range(2, pair.generations + 1):
            shared, to = settings(pair, seed, generation), folder / f"{anchor}-{generation}"
            students.append(generation_after(students[-1], anchor, pair, to, shared))
        for number, found in enumerate(distances(students, pair.base, data.eval, data.collator), 1):
            rows.append({"anchor": anchor, "seed": seed, "generation": number, **found})
    return rows


def means(rows: list[dict[str, Any]], anchor: float, key: str = "kl_to_base") -> list[float]:
    """Return the mean over the seeds of each generation of a line."""
    numbers = sorted({row["generation"] for row in rows})
    return [fmean(r[key] for r in rows if (r["anchor"], r["generation"]) == (anchor, number)) for number in numbers]


def verdicts(rows: list[dict[str, Any]]) -> dict[str, bool]:
    """Return which claims hold in the mean over the seeds."""
    anchored, free = means(rows, ANCHOR), means(rows, 0.0)
    return {
        "unanchored_grows": free[-1] > free[0],
        "anchored_is_nearer": all(ours < theirs for ours, theirs in zip(anchored[1:], free[1:], strict=True)),
        "anchored_stays_level_or_falls": anchored[-1] <= LEVEL * anchored[0],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=2, help="number of seeds (default: %(default)s)")
    parser.add_argument("--check", action="store_true", help="exit 1 if the gate is missed")
    parser.add_argument("--quick", action="store_true", help="20 steps, three generations, one seed")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/anchored_generations.json")
    args = parser.parse_args()
    from kdlm.sandbox import build

    pair, seeds = (QUICK, 1) if args.quick else (WHOLE, args.seeds)
    began = time.perf_counter()
    for name in ("code", pair.base, pair.student):  # once, before several processes ask for them
        build(name)
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        rows = [row for found in pool.map(partial(measure, pair), range(seeds)) for row in found]
    anchored, free = means(rows, ANCHOR), means(rows, 0.0)
    for name, values in ((f"anchor {ANCHOR}", anchored), ("no anchor", free)):
        print(f"{name}: KL(p_n || p_0) = {', '.join(f'{value:.4f}' for value in values)}")
    found = verdicts(rows)
    for name, holds in found.items():
        print(f"{name.replace('_', ' ')}: {'yes' if holds else 'NO'}")
    print(f"{time.perf_counter() - began:.0f} s")
    if args.save:
        from machine import described

        result = {
            "machine": described(),
            "settings": {**pair._asdict(), "seeds": seeds, "anchor": ANCHOR},
            "kl_to_base": {"anchored": anchored, "unanchored": free},
            **found,
            "rows": rows,
        }
        path = ROOT / "benchmarks" / "results" / "anchored_generations.json"
        path.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if args.check and not (found["unanchored_grows"] and found["anchored_is_nearer"]) else 0


if __name__ == "__main__":
    sys.exit(main())
