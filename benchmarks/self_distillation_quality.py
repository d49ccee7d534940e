"""Does a model teach itself better with what it will not be told at use? A small world, three seeds, equal rollouts.

    python benchmarks/self_distillation_quality.py [--seeds 3] [--check] [--quick] [--save]

A problem is a walk of five moves, three moves in ten of which the model at start does not know; it also reverses words.
All arms take as many optimiser steps, of 64 completions (or solutions) each, from the same model and problems:

    SFT             cross-entropy on the reference solutions, which are in another hand than the model's
    SFT, own hand   cross-entropy on the same solutions rewritten in the model's hand: not to be had outside this world
    SDFT            reverse KL on its own samples to an average of itself that is told the solution
    OPSD            Jensen-Shannon divergence on its own samples to its start that is told the solution
    OPSD, shuffled  the same, told the solution of another problem

Each arm's learning rate is the best, by problems solved, of those tried on a seed that is not reported; the trials are
in docs/self_distillation_quality.md. Solved is a held-out walk of which every place is right, in either hand, decoded
greedily; forgetting is KL(start || student) on held-out reversed words, in nats a token.

--check exits 1 unless on every seed SDFT and OPSD solve more than SFT and forget less. The figure, on the last line, is
the least margin in problems solved. --quick takes one seed and few steps and gates nothing. --save writes
results/self_distillation_quality.json.
"""

import argparse
import json
import os
import random
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

from self_distillation_world import (
    BATCH,
    Point,
    Row,
    measured,
    opened,
    problems,
    rollouts,
    row,
    told,
    told_collator,
    trained,
)

from kdlm.losses import JSD, CrossEntropy, ReverseKL
from kdlm.methods import SelfDistillation, SequenceKD
from kdlm.sandbox import build
from kdlm.teachers import SelfTeacher

ROOT = Path(__file__).resolve().parent.parent
RATES = {"SFT": 1e-2, "SFT, own hand": 1e-3, "SDFT": 1e-3, "OPSD": 1e-3, "OPSD, shuffled": 1e-3}
GATED = ("SDFT", "OPSD")
COLUMNS = ("greedy", "sampled", "forgetting")


class Plan(NamedTuple):
    """How many walks there are to learn from, and how long."""

    walks: int
    steps: int
    measured_every: int


WHOLE = Plan(walks=128, steps=120, measured_every=30)
QUICK = Plan(walks=128, steps=4, measured_every=2)

Arm = Callable[[list[Row], int], dict[str, Any]]
"""Walks to learn from, and the seed -> what `trained` is given."""


def sft(walks: list[Row], seed: int, *, hand: str) -> dict[str, Any]:
    rows = [row(one["prompt"], one[hand], index=n) for n, one in enumerate(walks)]
    return {"rows": rows, "method": SequenceKD([CrossEntropy()])}


def self_distillation(
    walks: list[Row], seed: int, *, loss: type, weights: Any, shuffled: bool = False
) -> dict[str, Any]:
    solutions = [one["solution"] for one in walks]
    if shuffled:
        random.Random(seed).shuffle(solutions)
    return {
        "rows": told(walks, solutions),
        "method": SelfDistillation([loss()]),
        "teacher": SelfTeacher(weights),
        "rollouts": rollouts(),
        "data_collator": told_collator(),
    }


ARMS: dict[str, Arm] = {
    "SFT": partial(sft, hand="solution"),
    "SFT, own hand": partial(sft, hand="completion"),
    "SDFT": partial(self_distillation, loss=ReverseKL, weights="average"),
    "OPSD": partial(self_distillation, loss=JSD, weights="start"),
    "OPSD, shuffled": partial(self_distillation, loss=JSD, weights="start", shuffled=True),
}


def measure(plan: Plan, seed: int) -> list[dict[str, Any]]:
    """Run every arm on one seed and return a row for each, with its curve."""
    found = []
    start = {"step": 0, **measured(opened("walks-start"), opened("walks-start"))}
    walks = problems("walks", "train")[seed * plan.walks : (seed + 1) * plan.walks]
    for name, arm in ARMS.items():
        curve = [start, *run(name, arm(walks, seed), plan, seed, RATES[name])]
        found.append({"arm": name, "seed": seed, "completions": plan.steps * BATCH, **curve[-1], "curve": curve})
    return found


def run(name: str, given: dict[str, Any], plan: Plan, seed: int, rate: float) -> list[Point]:
    began = time.perf_counter()
    options = {"steps": plan.steps, "every": plan.measured_every, "rate": rate, "seed": seed}
    curve = trained(opened("walks-start"), given.pop("rows"), **options, **given)
    shown = ", ".join(f"{column} {curve[-1][column]:.3f}" for column in COLUMNS)
    print(f"  {name} at {rate:g}, seed {seed}: {shown} ({time.perf_counter() - began:.0f} s)", flush=True)
    return curve


def margins(rows: list[dict[str, Any]], arm: str, other: str, key: str) -> list[float]:
    """Return by how much one arm ends above another, seed by seed."""
    ends = {(one["arm"], one["seed"]): one[key] for one in rows}
    return [ends[arm, seed] - ends[other, seed] for seed in sorted({one["seed"] for one in rows})]


def verdicts(rows: list[dict[str, Any]]) -> dict[str, bool]:
    """Return which claims hold, on every seed."""
    return {
        "solves_more_than_sft": all(min(margins(rows, arm, "SFT", "greedy")) > 0 for arm in GATED),
        "forgets_less_than_sft": all(max(margins(rows, arm, "SFT", "forgetting")) < 0 for arm in GATED),
    }


def show(rows: list[dict[str, Any]]) -> None:
    for seed in sorted({one["seed"] for one in rows}):
        print(f"seed {seed:<11}{''.join(f'{name:>12}' for name in COLUMNS)}")
        mine = [one for one in rows if one["seed"] == seed]
        for one in [{"arm": "start", **mine[0]["curve"][0]}, *mine]:
            print(f"  {one['arm']:<14}{''.join(f'{one[column]:>12.3f}' for column in COLUMNS)}")


def save(plan: Plan, rows: list[dict[str, Any]], found: dict[str, bool]) -> None:
    from machine import described

    settings = {**plan._asdict(), "batch": BATCH, "learning_rates": RATES}
    result = {"machine": described(), "settings": settings, **found, "runs": rows}
    path = ROOT / "benchmarks" / "results" / "self_distillation_quality.json"
    path.write_text(json.dumps(result, indent=1) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds (default: %(default)s)")
    parser.add_argument("--check", action="store_true", help="exit 1 if the gate is missed")
    parser.add_argument("--quick", action="store_true", help="4 steps, one seed; no gate")
    parser.add_argument("--save", action="store_true", help="write the results")
    args = parser.parse_args()
    plan, seeds = (QUICK, 1) if args.quick else (WHOLE, args.seeds)
    began = time.perf_counter()
    for name in ("walks-start", "walks", "reversals"):
        build(name)
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), get_context("spawn")) as pool:
        rows = [one for found in pool.map(partial(measure, plan), range(seeds)) for one in found]
    show(rows)
    found = verdicts(rows)
    print("; ".join(f"{claim.replace('_', ' ')}: {'yes' if holds else 'NO'}" for claim, holds in found.items()))
    if args.save:
        save(plan, rows, found)
    print(f"{time.perf_counter() - began:.0f} s")
    least = min(margin for arm in GATED for margin in margins(rows, arm, "SFT", "greedy"))
    print(f"least margin of SDFT and OPSD over SFT in problems solved: {least:+.3f}")
    return 1 if args.check and not args.quick and not all(found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
