"""What a teacher with another tokenizer is worth: bits per byte of its students, at equal steps of equal text.

    python benchmarks/cross_tokenizer_quality.py [--check] [--quick] [--save] [--work FOLDER] [--processes N]

The teacher reads 4,096 byte-level BPE tokens, one student 1,024 SentencePiece-unigram tokens and the other bytes. Each
is trained on a little text that is seen many times, a person's or the teacher's own, by cross-entropy (SFT), by ALM
and by ULD, the one of bytes by byte_kd too, from three seeds; on a person's text and from one seed also by the other
methods across tokenizers. Rows are cut by bytes, so that a step shows every student the same text. What is scored is
held-out text. Settings that differ between ways (weight of cross-entropy, temperature) were chosen on seed 0
beforehand, the learning rate for SFT.

The ceiling is a student of the same shape with the teacher's tokenizer. What forward KL takes off its bits per byte is
the gap: `closed` is what a way takes off SFT's bits per byte, over what forward KL takes off there, on the same text in
the same steps. (Levels cannot be compared: tables of embeddings, and so numbers of weights, differ with tokenizers.)
So much text, so often, is more than is good for some students: `gain, each at its best step` compares the lowest points
of both curves, which are taken on a few held-out rows.

Against TRL's GOLD trainer: see cross_tokenizer_race.py.

--check exits 1 unless in all four cells ALM's mean is below SFT's and ULD's, kdlm's better one of GOLD and ALM ends
below TRL's in each of its settings, and kdlm's GOLD and ALM have at least its tokens/s. The figure, on the last line,
is the least of ALM's margins over SFT. --quick takes few steps, one seed and a part of the held-out text, and gates
nothing. --save writes results/cross_tokenizer_quality.json here. What an arm found is kept in --work under a hash of
its settings and of kdlm's code: a run that was stopped goes on.
"""

import argparse
import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, replace
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any, NamedTuple

ENVIRONMENT = {
    **{"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
    **{"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1", "CUDA_VISIBLE_DEVICES": ""},
}
os.environ.update(ENVIRONMENT)

import torch  # noqa: E402  threads are counted when it loads
from cross_tokenizer_arms import BATCH, Arm, agreement, run  # noqa: E402
from cross_tokenizer_race import Racer, race, ratio  # noqa: E402
from cross_tokenizer_rows import PROMPT, ROW  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
TEXTS, FOREIGN, CEILING = ("human", "teacher-made"), ("unigram", "bytes"), "4k"
RATE = 2e-3
OPTIONS: dict[str, dict[str, Any]] = {
    "ALM": {"ce": 1.0},
    "GOLD": {"ce": 1.0, "merge": "bayesian"},
}
GATED, EXTRA = ("SFT", "ALM", "ULD"), ("GOLD", "shared vocabulary", "projection", "DSKD")


class Plan(NamedTuple):
    """How much is trained and scored.

    Attributes:
        rows: of each text, the first ones.
        scored: one held-out row in so many.
        raced: steps of the races against TRL, and on which students.
    """

    steps: int
    rows: int
    seeds: int
    scored: int
    raced: int
    racing: tuple[str, ...]


WHOLE = Plan(steps=300, rows=160, seeds=3, scored=2, raced=100, racing=FOREIGN)
QUICK = Plan(steps=6, rows=24, seeds=1, scored=24, raced=5, racing=("bytes",))


def arms(plan: Plan) -> Iterator[Arm]:
    """Yield all arms, those of the first seed first."""

    def arm(student: str, text: str, way: str, seed: int) -> Arm:
        options = tuple(OPTIONS.get(way, {}).items())
        return Arm(student, text, way, seed, plan.steps, RATE, options, plan.rows, plan.scored)

    for seed in range(plan.seeds):
        for text in TEXTS:
            yield from (arm(student, text, way, seed) for student, way in product(FOREIGN, GATED))
            yield arm("bytes", text, "byte KD", seed)
            yield from (arm(CEILING, text, way, seed) for way in ("SFT", "KD"))
        if seed == 0:
            yield from (arm(student, "human", way, 0) for student, way in product(FOREIGN, EXTRA))


def racers(plan: Plan, student: str) -> list[Racer]:
    """Return kdlm's GOLD and ALM, and TRL's GOLD as it comes and in the setting nearest to kdlm's."""
    arm = Arm(student, "human", "GOLD", 0, plan.raced, RATE, (), plan.rows, plan.scored)
    ours = [Racer(f"kdlm {way}", replace(arm, way=way, options=tuple(OPTIONS[way].items()))) for way in ("GOLD", "ALM")]
    aligned = {"use_extended_uld": student == "bytes"}
    near = {**aligned, "uld_token_merge_strategy": "bayesian", "uld_crossentropy_weight": 1.0}
    theirs = {"TRL GOLD": aligned, "TRL GOLD, bayesian, with cross-entropy": near}
    return [*ours, *(Racer(name, arm, tuple(options.items())) for name, options in theirs.items())]


def kept(path: Path, find: Callable[[], Any]) -> Any:
    """Return what an earlier run found, or find it and keep it."""
    if not path.is_file():
        found = find()
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(found))
        partial.rename(path)
    return json.loads(path.read_text())


def raced(plan: Plan, student: str, work: Path) -> list[dict[str, Any]]:
    """Race on one student; failures of a trainer are what is found of it."""
    given = racers(plan, student)
    settings = json.dumps([[racer.arm.key, asdict(racer)] for racer in given], sort_keys=True)
    name = hashlib.sha256(settings.encode()).hexdigest()[:16]
    return kept(work / f"race-{name}.json", lambda: race(given))


def trained(plan: Plan, work: Path, processes: int) -> list[dict[str, Any]]:
    """Train all arms, and print each as it ends."""
    found = []
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        waiting = [pool.submit(run, arm, work) for arm in arms(plan)]
        for done in as_completed(waiting):
            row = done.result()
            found.append(row)
            place = f"{row['student']}, {row['text']}, {row['way']}, seed {row['seed']}"
            print(f"  {place:<48}{row['bits_per_byte']:.4f}  {row['seconds']:.0f} s", flush=True)
    return found


def ends(rows: list[dict[str, Any]], student: str, text: str, way: str) -> list[float]:
    """Return the bits per byte at the end, seed by seed."""
    same = [row for row in rows if (row["student"], row["text"], row["way"]) == (student, text, way)]
    return [row["bits_per_byte"] for row in sorted(same, key=lambda row: row["seed"])]


def gained(rows: list[dict[str, Any]], student: str, text: str, way: str) -> list[float]:
    """Return what a way takes off SFT's bits per byte, seed by seed."""
    found = ends(rows, student, text, way)
    return [sft - value for sft, value in zip(ends(rows, student, text, "SFT"), found, strict=False)]


def closed(rows: list[dict[str, Any]], student: str, text: str, way: str) -> float:
    """Return a way's gain on SFT over that of forward KL with one tokenizer, over the seeds that the way has."""
    mine = gained(rows, student, text, way)
    return fmean(mine) / fmean(gained(rows, CEILING, text, "KD")[: len(mine)])


def on_the_way(rows: list[dict[str, Any]], student: str, text: str, way: str, seeds: int) -> list[float]:
    """Return the curve of bits per byte on a few held-out rows, the mean of the first seeds."""
    same = [row for row in rows if (row["student"], row["text"], row["way"]) == (student, text, way)]
    curves = [row["curve"] for row in sorted(same, key=lambda row: row["seed"])[:seeds]]
    return [fmean(value for _, value in points) for points in zip(*curves, strict=True)]


def table(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each student, text and way."""
    found = []
    for student, text, way in product((*FOREIGN, CEILING), TEXTS, (*GATED, "byte KD", *EXTRA, "KD")):
        values = ends(rows, student, text, way)
        if not values:
            continue
        line = {"student": student, "text": text, "way": way, "seeds": len(values), "bits_per_byte": fmean(values)}
        line["deviation"] = stdev(values) if len(values) > 1 else None
        curves = [on_the_way(rows, student, text, name, len(values)) for name in (way, "SFT")]
        line["above_its_best"] = curves[0][-1] - min(curves[0])
        line["gain"] = line["gain_at_best"] = line["closed"] = None
        if way != "SFT":
            line["gain"] = fmean(gained(rows, student, text, way))
            line["gain_at_best"] = min(curves[1]) - min(curves[0])
            line["closed"] = closed(rows, student, text, way)
        found.append(line)
    return found


def show(lines: list[dict[str, Any]]) -> None:
    """Print the table, which is also one of Markdown."""
    print("| student | text | way | seeds | bits per byte | gain on SFT | closed | gain, each at its best step |")
    print("|---|---|---|---|---|---|---|---|")
    for line in lines:
        spread = "" if line["deviation"] is None else f" ± {line['deviation']:.3f}"
        gains = ["", "", ""]
        if line["gain"] is not None:
            gains = [f"{line['gain']:+.3f}", f"{line['closed']:.0%}", f"{line['gain_at_best']:+.3f}"]
        first = [line["student"], line["text"], line["way"], str(line["seeds"]), f"{line['bits_per_byte']:.3f}{spread}"]
        print(f"| {' | '.join([*first, *gains])} |")


def races(plan: Plan, work: Path) -> dict[str, list[dict[str, Any]]]:
    """Race, and print what each trainer is worth."""
    found = {}
    for student in plan.racing:
        lines = raced(plan, student, work)
        rivals = [line for line in lines if line["name"].startswith("TRL")]
        for line in lines:
            if line["seconds"] is None:
                print(f"{student}, {line['name']}: could not run")
                continue
            line["seconds_a_step"] = median(line["seconds"])
            line["pace"] = {one["name"]: ratio(line, one) for one in rivals if one["seconds"] is not None}
            pace = ", ".join(f"{value:.2f}" for value in line["pace"].values())
            took = f"{line['seconds_a_step']:.3f} s a step, {pace} times the pace of TRL's"
            print(f"{student}, {line['name']:<40}{line['bits_per_byte']:.3f} bits per byte, {took}", flush=True)
        found[student] = lines
    return found


def verdicts(rows: list[dict[str, Any]], raced: dict[str, list[dict[str, Any]]]) -> dict[str, bool]:
    """Return which claims hold."""
    cells = list(product(FOREIGN, TEXTS))
    mean = {(cell, way): fmean(ends(rows, *cell, way)) for cell in cells for way in GATED}
    better, paces = [], []
    for lines in raced.values():
        ours = [line for line in lines if line["name"].startswith("kdlm")]
        for rival in lines:
            if rival["name"].startswith("TRL") and rival["seconds"] is not None:
                better.append(min(line["bits_per_byte"] for line in ours) < rival["bits_per_byte"])
                paces += [line["pace"][rival["name"]] for line in ours]
    return {
        "ALM is below SFT in all cells": all(mean[cell, "ALM"] < mean[cell, "SFT"] for cell in cells),
        "ALM is below ULD in all cells": all(mean[cell, "ALM"] < mean[cell, "ULD"] for cell in cells),
        "kdlm ends below TRL": bool(better) and all(better),
        "kdlm has at least TRL's tokens/s": bool(paces) and min(paces) >= 1,
    }


def save(plan: Plan, rows: list[dict[str, Any]], raced: dict[str, Any], found: dict[str, bool], checked: Any) -> None:
    from machine import described

    for line in (line for lines in raced.values() for line in lines):
        del line["seconds"], line["cpu_seconds"]
    cut = {"row_bytes": ROW, "context_bytes": PROMPT, "batch": BATCH}
    settings = {**plan._asdict(), **cut, "learning_rate": RATE, "options": OPTIONS}
    result = {"machine": described(), "settings": settings, "claims": found, "agreement": checked}
    path = ROOT / "benchmarks" / "results" / "cross_tokenizer_quality.json"
    path.write_text(json.dumps({**result, "table": table(rows), "race": raced, "runs": rows}, indent=1) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag in ("--check", "--quick", "--save"):
        parser.add_argument(flag, action="store_true")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "cross_tokenizer_quality")
    parser.add_argument("--processes", type=int, default=2, help="arms trained at a time (default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    plan, began = QUICK if args.quick else WHOLE, time.perf_counter()
    args.work.mkdir(parents=True, exist_ok=True)
    checked = agreement()
    print("bits per byte summed by hand and by kdlm's evaluation: {by_hand:.6f} and {by_kdlm:.6f}".format(**checked))
    rows = trained(plan, args.work, args.processes)
    lines = table(rows)
    show(lines)
    found_in_race = races(plan, args.work)
    found = verdicts(rows, found_in_race)
    print("; ".join(f"{claim}: {'yes' if holds else 'NO'}" for claim, holds in found.items()))
    if args.save:
        save(plan, rows, found_in_race, found, checked)
    print(f"{time.perf_counter() - began:.0f} s")
    least = min(fmean(gained(rows, student, text, "ALM")) for student, text in product(FOREIGN, TEXTS))
    print(f"least margin of ALM over SFT: {least:+.3f} bits per byte")
    return 1 if args.check and not args.quick and not all(found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
