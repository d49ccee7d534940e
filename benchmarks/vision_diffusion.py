"""Do the diffusion methods converge? A ring of Gaussians and the 8 x 8 digits, one step against the many-step teacher.

    python benchmarks/vision_diffusion.py [--check] [--quick] [--save] [--only NAME ...]

Every arm is a recipe of recipes/diffusion/, trained as it stands: 3,000 optimiser steps on the ring, 4,000 of batch 128
on the digits. What is sampled is measured against as many training rows. "Gap closed" is (start - student) / (start -
teacher): the start is the teacher in the student's single step, the teacher's own end is its flow in 16 Heun steps.
FD is the Frechet distance, of a classifier's features and of pixels: the first alone does not see too little spread.

Two controls are trained as DMD is, and have to fail: a fake score that is frozen, and the difference of scores with its
sign flipped.

--check exits 1 unless every gate of the arms that were run holds. The gates are about half of the margins that
throw-away prototypes had, see GATES. The figure, on the last line, is the least share of the feature gap that a
method other than GAN-only and LCM closes. --quick trains the arms in QUICK only. --only names arms. --save writes
results/vision_diffusion.json here. Two arms are trained at a time, with one thread each.
"""

import argparse
import contextlib
import io
import json
import sys
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from machine import described

from kdlm.diffusion import Karras
from kdlm.methods import DistributionMatching
from kdlm.methods.diffusion.pull import Compared, NormalisedDifference
from kdlm.recipe import load
from kdlm.train import assemble

ROOT = Path(__file__).resolve().parent.parent
RECIPES = ROOT / "recipes" / "diffusion"


class Flipped(NormalisedDifference):
    """DMD away from the teacher: a control that has to fail."""

    def __call__(self, seen: Compared) -> torch.Tensor:
        """Return DMD's value with the sign of its gradient turned."""
        value = super().__call__(seen)
        return value.detach() * 2 - value


def flipped(losses: Any, vocab: Any) -> DistributionMatching:
    """Return what recipes/diffusion/digits_dmd.yaml trains with, but for the sign."""
    times = Karras(low=0.02, high=2.5)
    return DistributionMatching(pull=Flipped(), steps=[2.5], times=times, ratio=5, ema=0.995)


FLIPPED = 'method={name: custom, target: "vision_diffusion:flipped"}'

NOT_SHOWN = ("runtime", "samples_per", "steps_per", "epoch", "model_preparation")
Gate = tuple[str, str, float]
"""A figure, `>=` or `<=`, and the bound."""
DIGITS: list[Gate] = [("gap_fd", ">=", 0.9), ("gap_fd_pixel", ">=", 0.75), ("accuracy_ratio", ">=", 0.95)]
GAN: list[Gate] = [("gap_fd", ">=", 0.75), ("gap_fd_pixel", ">=", 0.55), ("accuracy_ratio", ">=", 0.95)]
LCM: list[Gate] = [("gap_fd", ">=", 0.75), ("gap_fd_pixel", ">=", 0.75), ("accuracy_ratio", ">=", 0.95)]
STRAIGHT: list[Gate] = [("gap_fd", ">=", 0.9), ("straightness_ratio", "<=", 0.35)]
GUIDED: list[Gate] = [(f"residual_w{w}", "<=", 0.15) for w in ("0.5", "1", "2")]
FAILS: list[Gate] = [("gap_fd_pixel", "<=", 0.5)]
RING: list[Gate] = [("good_ratio", ">=", 0.6), ("modes", ">=", 8), ("tv", "<=", 0.08)]
ARMS: dict[str, tuple[list[str], list[str], list[Gate]]] = {
    "ring, DMD, inclusive": (["ring_dmd"], [], RING),
    "ring, DMD, exclusive": (["ring_dmd"], ["method.cadence=exclusive"], RING),
    "DMD": (["digits_dmd"], [], DIGITS),
    "DMD, exclusive": (["digits_dmd"], ["method.cadence=exclusive"], DIGITS),
    "DMD, 1:1": (["digits_dmd"], ["method.ratio=1"], DIGITS),
    "DMD, frozen fake score": (["digits_dmd"], ["method.fake_learning_rate=1e-12"], FAILS),
    "DMD, sign flipped": (["digits_dmd"], [FLIPPED], FAILS),
    "VSD": (["digits_vsd"], [], DIGITS),
    "DMD2": (["digits_dmd2"], [], DIGITS),
    "DMD2, 5:1": (["digits_dmd2"], ["method.ratio=5"], DIGITS),
    "f-distill": (["digits_f_distill"], [], DIGITS),
    "SIM": (["digits_sim"], [], DIGITS),
    "SiD": (["digits_sid"], [], DIGITS),
    "LADD": (["digits_ladd"], [], GAN),
    "CD": (["digits_cd"], [], DIGITS),
    "CT": (["digits_ct"], [], DIGITS),
    "LCM": (["digits_lcm"], [], LCM),
    "sCM": (["digits_scm"], [], DIGITS),
    "rCM": (["digits_rcm"], [], DIGITS),
    "reflow": (["digits_reflow"], [], STRAIGHT),
    "InstaFlow": (["digits_reflow", "digits_instaflow"], [], DIGITS),
    "progressive": (["digits_progressive"], [], DIGITS),
    "CFG": (["digits_cfg"], [], GUIDED),
    "CFG, adapters": (["digits_cfg_lora"], [], []),
}
"""Arm -> recipes of recipes/diffusion/ in their order, overrides of the last one, gates."""
QUICK = ("ring, DMD, inclusive", "DMD")


def trained(name: str) -> dict[str, Any]:
    """Train an arm and return its figures, with those of its two ends."""
    torch.set_num_threads(1)
    chain, overrides, _ = ARMS[name]
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        for place, recipe in enumerate(chain):
            changes = [f"run_dir={Path(folder) / recipe}", "training.eval_strategy=no", "training.logging_steps=500"]
            if place:
                before = Path(folder) / chain[place - 1] / "student"
                changes += [f"student.path={before}", f"teacher.path={before}"]
            run = load(RECIPES / f"{recipe}.yaml", [*changes, *(overrides if recipe == chain[-1] else [])])
            trainer = assemble(run).trainer
            trainer.train()
            trainer.exported.save_pretrained(Path(folder) / recipe / "student")
    with contextlib.redirect_stdout(io.StringIO()):
        own = {name.removeprefix("eval_"): value for name, value in trainer.evaluate().items()}
    figures = {name: own[name] for name in own if not name.startswith(NOT_SHOWN)}
    ends = {} if trainer.sampling is None else trainer.yardstick.ends
    for figure in ("accuracy", "good"):
        if figure in figures and ends:
            figures[f"{figure}_ratio"] = figures[figure] / ends["teacher"][figure]
    return {"seconds": time.perf_counter() - began, "figures": figures, "ends": ends}


def holds(figures: Mapping[str, float], gate: Gate) -> bool:
    """Whether a figure keeps its bound."""
    figure, way, bound = gate
    return figures[figure] >= bound if way == ">=" else figures[figure] <= bound


def shown(name: str, row: dict[str, Any]) -> str:
    """Return a line of the table, with the gates that do not hold."""
    figures, gates = row["figures"], ARMS[name][2]
    wanted = ("gap_fd", "gap_fd_pixel", "fd", "fd_pixel", "accuracy", "good", "modes", "tv")
    wanted += ("straightness_ratio", "residual_w0.5", "residual_w1", "residual_w2")
    said = "  ".join(f"{key} {figures[key]:.3g}" for key in wanted if key in figures)
    missed = [f"{figure} {way} {bound}" for figure, way, bound in gates if not holds(figures, (figure, way, bound))]
    return f"{name:<26}{said}  {row['seconds']:.0f} s{'' if not missed else '  MISSED: ' + ', '.join(missed)}"


def compared(table: Mapping[str, dict[str, Any]]) -> list[str]:
    """Return what is missed between arms: DMD2 and f-distill make pixel FD at most 0.6 of DMD's."""
    if "DMD" not in table:
        return []
    bound = 0.6 * table["DMD"]["figures"]["fd_pixel"]
    better = [name for name in ("DMD2", "f-distill") if name in table]
    return [f"{name}: pixel FD above 0.6 of DMD's" for name in better if table[name]["figures"]["fd_pixel"] > bound]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag in ("--check", "--quick", "--save"):
        parser.add_argument(flag, action="store_true")
    parser.add_argument("--only", nargs="+", choices=list(ARMS), default=None, metavar="NAME")
    args = parser.parse_args()
    names = args.only or (QUICK if args.quick else tuple(ARMS))
    table: dict[str, dict[str, Any]] = {}
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        for name, row in zip(names, pool.map(trained, names), strict=True):
            table[name] = row
            print(shown(name, row), flush=True)
    missed = [name for name in names if not all(holds(table[name]["figures"], gate) for gate in ARMS[name][2])]
    missed += compared(table)
    if args.save:
        text = json.dumps({"machine": described(), "arms": table}, indent=1)
        (ROOT / "benchmarks" / "results" / "vision_diffusion.json").write_text(text + "\n", encoding="utf-8")
    print("missed: " + "; ".join(missed) if missed else "every gate holds")
    strict = [name for name in names if DIGITS[0] in ARMS[name][2]]
    print(f"least feature gap closed: {min((table[name]['figures']['gap_fd'] for name in strict), default=0):.3f}")
    return int(args.check and bool(missed))


if __name__ == "__main__":
    sys.exit(main())
