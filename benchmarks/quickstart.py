"""What distillation buys, on two cores: the same small student from text alone, from forward KL, and from TAID.

Equal student, data, tokens and steps; only the objective differs. A teacher of 2.1M weights, trained on the whole
Python standard library, teaches a student of 0.4M that sees 3 % of it. Ends with a table, a plot (quickstart.png), a
page (report.html) and the figure: the smallest share of the gap in held-out loss, between plain training and the
teacher, that forward KL closes over the seeds.

    python benchmarks/quickstart.py [--seeds 3] [--check] [--quick] [--save]

--check exits 1 unless both distilled students beat cross-entropy on every seed and the figure is at least 40 %.
--quick runs 60 steps of one seed: a smoke test, whose figure is below the gate.
--save writes the results beside the other benchmarks' (benchmarks/results/quickstart.json).
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RECIPE = ROOT / "recipes" / "quickstart.yaml"
VARIANTS = {
    "cross-entropy": ["method={name: sequence_kd}", "losses=[{name: cross_entropy}]"],
    "forward KL": ["method={name: logit_kd}", "losses=[{name: forward_kl}]"],
    "TAID": ["method={name: taid}", "losses=[]"],
}
GATE = 0.40


def run_folder(folder: Path, variant: str, seed: int) -> Path:
    return folder / f"{variant.replace(' ', '-').lower()}-{seed}"


def run(variant: str, seed: int, folder: Path, extra: list[str]) -> dict[str, Any]:
    """Train one student in a process of its own, on one thread, and return its results and curve."""
    run_dir = run_folder(folder, variant, seed)
    shutil.rmtree(run_dir, ignore_errors=True)
    student = f"student={{name: fresh, config_from: 'sandbox:code-student', seed: {seed}}}"
    command = [sys.executable, "-m", "kdlm", "train", str(RECIPE), *VARIANTS[variant], *extra]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    began = time.perf_counter()
    done = subprocess.run(
        [*command, student, f"seed={seed}", f"run_dir={run_dir}"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        sys.exit(f"{variant}, seed {seed}: kdlm train ended with {done.returncode}\n{done.stdout[-3000:]}")
    results = json.loads((run_dir / "results.json").read_text())
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    curve = [(line["step"], line["eval_cross_entropy"]) for line in lines if "eval_cross_entropy" in line]
    print(f"  {variant}, seed {seed}: held-out loss {results['eval_cross_entropy']:.3f}", flush=True)
    return {
        "variant": variant,
        "seed": seed,
        "held_out_loss": results["eval_cross_entropy"],
        "teacher_loss": results["eval_teacher_cross_entropy"],
        "top1_agreement": results["eval_top1_agreement"],
        "kl_to_teacher": results["eval_kl_to_teacher"],
        "curve": curve,
        "seconds": time.perf_counter() - began,
    }


def with_gaps(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add the share of the gap closed: 0 is the cross-entropy student of the same seed, 1 the teacher."""
    plain = {row["seed"]: row["held_out_loss"] for row in rows if row["variant"] == "cross-entropy"}
    for row in rows:
        start = plain[row["seed"]]
        row["gap_closed"] = (start - row["held_out_loss"]) / (start - row["teacher_loss"])
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    seeds = sorted({row["seed"] for row in rows})
    table = Table(title=f"One student, three objectives: mean over {len(seeds)} seed{'s' * (len(seeds) > 1)}")
    for column in ("", "held-out loss", "KL to teacher", "top-1 agreement", "gap closed"):
        table.add_column(column, justify="left" if not column else "right")
    for variant in VARIANTS:
        mine = [row for row in rows if row["variant"] == variant]
        mean = {key: sum(row[key] for row in mine) / len(mine) for key in mine[0] if isinstance(mine[0][key], float)}
        table.add_row(
            variant,
            f"{mean['held_out_loss']:.3f}",
            f"{mean['kl_to_teacher']:.3f}",
            f"{mean['top1_agreement']:.1%}",
            f"{mean['gap_closed']:.0%}" if variant != "cross-entropy" else "",
        )
    teacher = sum(row["teacher_loss"] for row in rows) / len(rows)
    table.add_row("teacher", f"{teacher:.3f}", "0.000", "100.0%", "100%")
    Console().print(table)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (curves, bars) = plt.subplots(1, 2, figsize=(11, 4.2), width_ratios=(3, 2))
    colours = dict(zip(VARIANTS, ("tab:gray", "tab:blue", "tab:orange"), strict=True))
    for row in rows:
        steps, losses = zip(*row["curve"], strict=True)
        label = row["variant"] if row["seed"] == rows[0]["seed"] else None
        curves.plot(steps, losses, color=colours[row["variant"]], alpha=0.8, label=label)
    curves.axhline(rows[0]["teacher_loss"], color="black", linestyle="--", linewidth=1, label="teacher")
    curves.set(xlabel="optimiser step", ylabel="held-out loss (nats a token)", title="Equal student, data and steps")
    curves.legend(frameon=False)
    for place, variant in enumerate(list(VARIANTS)[1:]):
        gaps = [100 * row["gap_closed"] for row in rows if row["variant"] == variant]
        bars.bar(place, sum(gaps) / len(gaps), color=colours[variant], width=0.6)
        bars.scatter([place] * len(gaps), gaps, color="black", s=14, zorder=3)
    bars.axhline(100 * GATE, color="black", linestyle=":", linewidth=1)
    bars.set_xticks(range(len(VARIANTS) - 1), list(VARIANTS)[1:])
    bars.set(ylabel="% of the gap to the teacher closed", title="Each dot is a seed")
    for axis in (curves, bars):
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def write_page(rows: list[dict[str, Any]], folder: Path) -> None:
    """Write the report of all runs: curves, gap, calibration, and texts token by token."""
    from kdlm.report import report

    for line in report([run_folder(folder, row["variant"], row["seed"]) for row in rows], folder / "report.html"):
        print(line)


def save(rows: list[dict[str, Any]], figure: float) -> None:
    from machine import described

    path = ROOT / "benchmarks" / "results" / "quickstart.json"
    path.write_text(json.dumps({"machine": described(), "figure": figure, "runs": rows}, indent=1) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=1, help="number of seeds (default: 1)")
    parser.add_argument("--check", action="store_true", help="exit 1 if the gate is missed")
    parser.add_argument("--quick", action="store_true", help="60 steps of one seed")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/quickstart.json")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "quickstart", help="where the runs go")
    args = parser.parse_args()
    from kdlm.sandbox import build

    began = time.perf_counter()
    args.folder.mkdir(parents=True, exist_ok=True)
    print("Making the teacher, the student and their text (once; minutes on two cores)", flush=True)
    for name in ("code", "code-student", "code-teacher"):
        build(name)
    seeds = range(1 if args.quick else args.seeds)
    extra = ["training.max_steps=60", "training.eval_steps=20"] if args.quick else []
    print(f"Training {len(VARIANTS) * len(seeds)} students", flush=True)
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 1))) as pool:
        jobs = [pool.submit(run, variant, seed, args.folder, extra) for seed in seeds for variant in VARIANTS]
        rows = with_gaps([job.result() for job in jobs])
    show(rows)
    plot(rows, args.folder / "quickstart.png")
    write_page(rows, args.folder)
    print(f"plot: {args.folder / 'quickstart.png'}; {time.perf_counter() - began:.0f} s")
    figure = min(row["gap_closed"] for row in rows if row["variant"] == "forward KL")
    beaten = all(row["gap_closed"] > 0 for row in rows if row["variant"] != "cross-entropy")
    if args.save:
        save(rows, figure)
    verdict = "" if beaten else "; a distilled student did not beat cross-entropy"
    print(f"share of the gap closed by forward KL, least over seeds: {figure:.2f} (gate {GATE:.2f}){verdict}")
    return 1 if args.check and not (beaten and figure >= GATE) else 0


if __name__ == "__main__":
    sys.exit(main())
