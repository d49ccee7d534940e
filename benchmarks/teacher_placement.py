"""Trained tokens per second on one CPU core, by where the teacher is and how many sequences it reads at once.

    python benchmarks/teacher_placement.py [--quick] [--check] [--save]

The run of recipes/sandbox/sliced.yaml, five times: a resident teacher that reads the student's micro-batches of 4, one
whose weights rest between its turns (`placement: sliced`), both again reading the 16 sequences of a step at once
(`batch_size`), and one behind `kdlm serve` beside it. Each run is a process of its own on one thread, in turn;
nothing is evaluated or saved. The pace is that of the second half of the steps.

On a CPU the host's memory is the device's: a sliced teacher moves nothing, and what it costs beside a resident one is
the bookkeeping. Whether larger batches are faster is a matter of the device; a GPU was not measured.

The figure is the largest relative difference between the five last losses: all learn the same. --check exits 1 when it
is above 1e-4; the paces have no gate. --quick takes the tiny pair and few steps; --save writes
benchmarks/results/teacher_placement.json.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any

from train_throughput_cpu import ENVIRONMENT

ROOT = Path(__file__).resolve().parent.parent
GATE, PORT = 1e-4, 8117
WHOLE = 16
ARMS: dict[str, list[str]] = {
    "resident": ["teacher.placement=resident", "teacher.batch_size=null"],
    "sliced": ["teacher.placement=sliced", "teacher.batch_size=null"],
    f"resident, {WHOLE} at once": ["teacher.placement=resident", f"teacher.batch_size={WHOLE}"],
    f"sliced, {WHOLE} at once": ["teacher.placement=sliced", f"teacher.batch_size={WHOLE}"],
    "served": [],
}
PLAIN = ["data.eval=null", "training.eval_strategy=no", "training.save_strategy=no", "training.use_cpu=true"]


def measured(name: str, teacher: str, folder: Path, options: list[str]) -> dict[str, float]:
    """Train one arm; return its pace and last loss."""
    run = folder / name.replace(",", "").replace(" ", "-")
    words = ["train", str(ROOT / "recipes" / "sandbox" / "sliced.yaml"), f"run_dir={run}", "training.logging_steps=1"]
    if name == "served":
        of = f"{{name: sandbox, model: {teacher}}}"
        options = [*options, f"teacher={{name: served, url: 'http://127.0.0.1:{PORT}', of: {of}}}"]
    else:
        options = [*options, f"teacher.model={teacher}", *ARMS[name]]
    said = subprocess.run(command(*words, *PLAIN, *options), env=environment(), capture_output=True, text=True)
    if said.returncode:
        raise RuntimeError(f"{name}: {said.stderr[-2000:]}")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    pace = fmean(line["tokens_per_second"] for line in steps[len(steps) // 2 :])
    return {"tokens_per_second": pace, "loss": steps[-1]["loss"]}


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "kdlm", *words]


def environment() -> dict[str, str]:
    return os.environ | ENVIRONMENT | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels"), *sys.path[1:]])}


@contextmanager
def serving(teacher: str) -> Iterator[None]:
    """Serve the teacher in a process of its own while the context is open."""
    words = ("serve", "--model", f"sandbox:{teacher}", "--port", str(PORT), "--device", "cpu")
    server = subprocess.Popen(command(*words), env=environment(), stdout=subprocess.DEVNULL)
    try:
        while True:
            if server.poll() is not None:
                raise RuntimeError(f"kdlm serve ended with exit code {server.returncode}")
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{PORT}/v1/info", timeout=1).close()
                break
            except OSError:
                time.sleep(0.5)
        yield
    finally:
        server.terminate()
        server.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the tiny pair and few steps")
    parser.add_argument("--check", action="store_true", help="exit 1 when the runs differ in what they learn")
    parser.add_argument("--save", action="store_true", help="write the results into benchmarks/results")
    given = parser.parse_args()
    teacher = "code-teacher-tiny" if given.quick else "code-teacher"
    options = ["training.max_steps=4", "student.model=code-student-tiny"] if given.quick else ["training.max_steps=24"]
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="kdlm-placement-") as name:
        for arm in ARMS:
            if arm != "served":
                rows[arm] = measured(arm, teacher, Path(name), options)
                continue
            with serving(teacher):
                rows[arm] = measured(arm, teacher, Path(name), options)
    for arm, row in rows.items():
        of = row["tokens_per_second"] / rows["resident"]["tokens_per_second"]
        print(
            f"{arm:<24}{row['tokens_per_second']:>10,.0f} tokens/s{of:>7.2f} of resident   last loss {row['loss']:.6f}"
        )
    losses = [row["loss"] for row in rows.values()]
    apart = (max(losses) - min(losses)) / min(losses)
    if given.save:
        from machine import described

        results = {"machine": described() | {"threads": 1}, "gate": GATE, "apart": apart, "arms": rows}
        (ROOT / "benchmarks" / "results" / "teacher_placement.json").write_text(json.dumps(results, indent=2) + "\n")
    print(f"largest relative difference of the last losses: {apart:.1e}")
    return int(given.check and apart > GATE)


if __name__ == "__main__":
    sys.exit(main())
