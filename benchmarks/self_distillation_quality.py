"""Does a model teach itself better with what it will not be told at use? A small world, three seeds, equal rollouts.

    python benchmarks/self_distillation_quality.py [--claims 1,2,3,4] [--seeds 3] [--check] [--quick] [--save]

A problem is a walk of five moves, three moves in ten of which the model at start does not know; it also reverses words.
The arms of a claim begin with the same model and problems, and draw as many completions. Those of claim 1 take as many
optimiser steps, of 64 completions (or solutions) each:

    SFT             cross-entropy on the reference solutions, which are in another hand than the model's
    SFT, own hand   cross-entropy on the same solutions rewritten in the model's hand: not to be had outside this world
    SDFT            reverse KL on its own samples to an average of itself that is told the solution
    OPSD            Jensen-Shannon divergence on its own samples to its start that is told the solution
    OPSD, shuffled  the same, told the solution of another problem

Those of claim 2 (SD-Zero against rejection fine-tuning) and 3 (RLAD against GRPO) are in self_distillation_rewards.py,
of 4 (feedback against reward alone) in self_distillation_feedback.py.

Learning rates and other settings are those that solved most problems among what was tried on a seed that is not
reported; the trials are in docs/self_distillation_quality.md. Solved is a held-out walk of which every place is right,
in either hand, decoded greedily; forgetting is KL(start || student) on held-out reversed words, in nats a token.

A statement holds where it does on every seed. --check exits 1 unless all hold but those of `NOT_SHOWN`; the figure, on
the last line, is how many do. --quick takes one seed and few steps and gates nothing. --save writes
results/self_distillation_quality.json, where claims that were not run stay as they were.
"""

import argparse
import json
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

from self_distillation_feedback import HEARING, hearing
from self_distillation_rewards import REVISING, REWARDED, against_grpo, revising, rewarded
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
SELF = ("SDFT", "OPSD")
COLUMNS = ("greedy", "sampled", "forgetting")


class Plan(NamedTuple):
    """How many walks there are to learn from, and how long by an arm that is told solutions."""

    walks: int
    steps: int
    measured_every: int


WHOLE = Plan(walks=128, steps=120, measured_every=30)
QUICK = Plan(walks=128, steps=4, measured_every=2)

Found = dict[str, Any]
"""A run: its claim, arm, seed and curve, and the last point of it."""
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


def told_solutions(walks: list[Row], seed: int, quick: bool, name: str) -> list[Point]:
    """Return the curve of an arm of claim 1."""
    plan, given = QUICK if quick else WHOLE, ARMS[name](walks, seed)
    options = {"steps": plan.steps, "every": plan.measured_every, "rate": RATES[name], "seed": seed}
    curve = trained(opened("walks-start"), given.pop("rows"), **options, **given)
    return [{**point, "completions": point["step"] * BATCH} for point in curve]


def margins(rows: list[Found], arm: str, other: str, key: str) -> list[float]:
    """Return by how much one arm ends above another, seed by seed."""
    ends = {(one["arm"], one["seed"]): one[key] for one in rows}
    return [ends[arm, seed] - ends[other, seed] for seed in sorted({one["seed"] for one in rows})]


def solves_more(rows: list[Found], arms: Sequence[str], others: Sequence[str]) -> bool:
    """Say whether each of the arms solves more than each of the others, on every seed."""
    return all(min(margins(rows, arm, other, "greedy")) > 0 for arm in arms for other in others)


def forgets_less(rows: list[Found], arms: Sequence[str], others: Sequence[str]) -> bool:
    return all(max(margins(rows, arm, other, "forgetting")) < 0 for arm in arms for other in others)


def against_sft(rows: list[Found]) -> dict[str, bool]:
    return {
        "self-distillation solves more than SFT": solves_more(rows, SELF, ["SFT"]),
        "self-distillation forgets less than SFT": forgets_less(rows, SELF, ["SFT"]),
    }


def against_rejection(rows: list[Found]) -> dict[str, bool]:
    why = "SD-Zero, told why"
    return {
        "SD-Zero solves more than RFT": solves_more(rows, ["SD-Zero"], ["RFT", "RFT, once"]),
        "SD-Zero forgets less than RFT": forgets_less(rows, ["SD-Zero"], ["RFT", "RFT, once"]),
        "SD-Zero told why solves more than RFT": solves_more(rows, [why], ["RFT", "RFT, once"]),
        "SD-Zero told why solves more than RFT told why": solves_more(rows, [why], ["RFT, told why"]),
        "SD-Zero told why forgets less than RFT told why": forgets_less(rows, [why], ["RFT, told why"]),
    }


def against_reward_alone(rows: list[Found]) -> dict[str, bool]:
    return {
        "RLTF-SD solves more than reward alone": solves_more(rows, ["RLTF-SD"], ["reward alone"]),
        "RLTF-SD solves more than where the verifier is mute": solves_more(rows, ["RLTF-SD"], ["RLTF-SD, mute"]),
        "RLTF-SD solves more than rejection": solves_more(rows, ["RLTF-SD"], ["rejection"]),
        "RLTF-SD forgets less than rejection": forgets_less(rows, ["RLTF-SD"], ["rejection"]),
        "RLTF-FM solves more than reward alone": solves_more(rows, ["RLTF-FM"], ["reward alone"]),
    }


class Claim(NamedTuple):
    """Arms that are compared.

    Attributes:
        arms: their names.
        curve: walks, the seed, whether it is but a quick run, and an arm's name -> its curve.
        verdicts: all runs -> which statements hold on every seed.
    """

    arms: Sequence[str]
    curve: Callable[[list[Row], int, bool, str], list[Point]]
    verdicts: Callable[[list[Found]], dict[str, bool]]


CLAIMS = {
    1: Claim(list(ARMS), told_solutions, against_sft),
    2: Claim(list(REVISING), revising, against_rejection),
    3: Claim(list(REWARDED), rewarded, against_grpo),
    4: Claim(list(HEARING), hearing, against_reward_alone),
}
NOT_SHOWN = frozenset(
    {
        "SD-Zero solves more than RFT",
        "SD-Zero told why solves more than RFT told why",
        "RLAD gets there in fewer steps than GRPO",
        "RLAD gets there in fewer steps than GRPO, KL",
        "RLTF-SD solves more than rejection",
        "RLTF-FM solves more than reward alone",
    }
)
"""Statements that do not hold in this world, which --check does not demand."""


def measure(quick: bool, run: tuple[int, int]) -> list[Found]:
    """Run every arm of a claim on one seed and return a row for each, with its curve."""
    number, seed = run
    claim, found = CLAIMS[number], []
    start = {"step": 0, "completions": 0, **measured(opened("walks-start"), opened("walks-start"))}
    walks = problems("walks", "train")[seed * WHOLE.walks : (seed + 1) * WHOLE.walks]
    for name in claim.arms:
        began = time.perf_counter()
        curve = [start, *claim.curve(walks, seed, quick, name)]
        shown = ", ".join(f"{column} {curve[-1][column]:.3f}" for column in COLUMNS)
        print(f"  {name}, seed {seed}: {shown} ({time.perf_counter() - began:.0f} s)", flush=True)
        found.append({"claim": number, "arm": name, "seed": seed, **curve[-1], "curve": curve})
    return found


def show(rows: list[Found]) -> None:
    for number, seed in sorted({(one["claim"], one["seed"]) for one in rows}):
        print(f"claim {number}, seed {seed:<9}{''.join(f'{name:>12}' for name in COLUMNS)}")
        mine = [one for one in rows if (one["claim"], one["seed"]) == (number, seed)]
        for one in [{"arm": "start", **mine[0]["curve"][0]}, *mine]:
            print(f"  {one['arm']:<18}{''.join(f'{one[column]:>12.3f}' for column in COLUMNS)}")


def save(rows: list[Found], found: dict[str, bool]) -> None:
    """Write the results; those of claims that were not run stay."""
    from machine import described

    path = ROOT / "benchmarks" / "results" / "self_distillation_quality.json"
    before = json.loads(path.read_text()) if path.exists() else {"holds": {}, "runs": []}
    kept = [one for one in before["runs"] if one["claim"] not in {new["claim"] for new in rows}]
    settings = {**WHOLE._asdict(), "batch": BATCH, "learning_rates": RATES}
    runs = sorted([*kept, *rows], key=lambda one: one["claim"])
    result = {"machine": described(), "settings": settings, "holds": before["holds"] | found, "runs": runs}
    path.write_text(json.dumps(result, indent=1) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--claims", default=",".join(map(str, CLAIMS)), help="which (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds (default: %(default)s)")
    parser.add_argument("--check", action="store_true", help="exit 1 if the gate is missed")
    parser.add_argument("--quick", action="store_true", help="few steps, one seed; no gate")
    parser.add_argument("--save", action="store_true", help="write the results")
    args = parser.parse_args()
    claims, seeds = [int(one) for one in args.claims.split(",")], 1 if args.quick else args.seeds
    began = time.perf_counter()
    for name in ("walks-start", "walks-teacher", "walks", "reversals"):
        build(name)
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), get_context("spawn")) as pool:
        found = pool.map(partial(measure, args.quick), product(claims, range(seeds)))
        rows = [one for runs in found for one in runs]
    show(rows)
    holds: dict[str, bool] = {}
    for number in claims:
        holds |= CLAIMS[number].verdicts([one for one in rows if one["claim"] == number])
    for statement, true in holds.items():
        print(f"{'yes' if true else 'NO '}  {statement}{' (not demanded)' * (statement in NOT_SHOWN)}")
    if args.save and not args.quick:
        save(rows, holds)
    print(f"{time.perf_counter() - began:.0f} s")
    missed = [statement for statement, true in holds.items() if not true and statement not in NOT_SHOWN]
    print(f"{sum(holds.values())} of {len(holds)} statements hold")
    return 1 if args.check and not args.quick and missed else 0


if __name__ == "__main__":
    sys.exit(main())
