"""Trained tokens per second and memory of on-policy distillation on a CPU: kdlm beside TRL's two on-policy trainers.

    python benchmarks/on_policy_throughput.py [--quick] [--check] [--save]

A step draws one completion of every prompt by transformers' `generate`, asks the teacher about it and updates the
student, on one thread, at 2,048 and 32,768 ids. What is alike for all, and how, is said in on_policy_trainers.py.

Each trainer runs in a process of its own and they take turns, one step each, in an order that moves on, so that a
machine's other work falls on all alike. A ratio is the median over the turns of one trainer's seconds over another's in
the same turn; `cpu` is the same of processor time. Memory is the peak of the resident set while training; `extra` of
it was not resident before.

kdlm's other ways to make text (`every`, `asynchronous`) run by themselves, one after the other, with plain kdlm beside
them. Asynchronous generation runs in a thread of its own: it takes a second core, and pays where there is one (or where
the engine sits elsewhere). Waiting: the share of wall time that steps stood still for completions.

The figure is the least of kdlm's tokens/s over those of the faster of the two. --check exits 1 when it is below 1 or
kdlm's peak is above the leaner one's. --quick takes few turns and leaves out the JSD and some ways, --save writes
benchmarks/results/on_policy_throughput.json.
"""

import argparse
import ctypes
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from on_policy_trainers import BATCH, NEW, STUDENT, TEACHER, TRAINERS, WAYS, built
from transformers import Trainer, TrainerCallback

ROOT = Path(__file__).resolve().parent.parent
WARM_UP = 2
POINTS = [(vocab, beta) for beta in (1.0, 0.5) for vocab in (2048, 32_768)]
ENVIRONMENT = {
    **{"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
    **{"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1", "CUDA_VISIBLE_DEVICES": ""},
    "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]),
}


class Turns(TrainerCallback):
    """Takes one step when told to, and says how long it took and how long `generate` did."""

    def __init__(self, trainer: Trainer, student: Any, say: Callable[[dict[str, Any]], None], wait: bool):
        self.trainer, self.say, self.wait = trainer, say, wait
        self.generating = self.began = self.cpu = self.loss = 0.0
        generate = student.generate

        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return generate(*args, **kwargs)
            finally:
                self.generating += time.perf_counter() - began

        if wait:  # a way of its own may copy the student, and this with it
            student.generate = timed

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        seconds, cpu = time.perf_counter() - self.began, time.process_time() - self.cpu
        total = self.trainer._tr_loss.item()
        waited = getattr(getattr(self.trainer, "rounds", None), "waited", 0.0)
        took = {"seconds": seconds, "cpu_seconds": cpu, "generating": self.generating, "waited": waited}
        self.say({**took, "loss": total - self.loss})
        if self.wait and not sys.stdin.readline():
            sys.exit("nobody listens any more")
        self.generating, self.loss = 0.0, total
        self.began, self.cpu = time.perf_counter(), time.process_time()


def resident(key: str) -> float:
    """MiB of a field of this process: VmRSS (now) or VmHWM (highest since the last reset)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(key + ":"))


def child(which: str, vocab: int, beta: float, steps: int, say: Callable[[dict[str, Any]], None]) -> None:
    """Train once, in this process, and say what each step and the whole took."""
    import torch
    from transformers.utils import logging as hf_logging

    torch.set_num_threads(1)
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        trainer, student = built(which, vocab, beta, folder, steps)
        trainer.add_callback(Turns(trainer, student, say, wait=which not in WAYS))
        ctypes.CDLL(None).malloc_trim(0)
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # starts VmHWM anew
        trainer.train()
        peak = resident("VmHWM")
    say({"peak_mib": peak, "extra_mib": peak - before})


class Child:
    """A trainer in a process of its own."""

    def __init__(self, which: str, vocab: int, beta: float, steps: int):
        command = [sys.executable, __file__, "--point", which, str(vocab), str(beta), str(steps)]
        self.which, self.errors = which, tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True,
            env=os.environ | ENVIRONMENT,
        )  # fmt: skip

    def hear(self) -> dict[str, Any]:
        line = self.process.stdout.readline() if self.process.stdout else ""
        if not line:
            self.errors.seek(0)
            sys.exit(f"{self.which} ended with {self.process.wait()}\n{self.errors.read()[-3000:]}")
        return json.loads(line)

    def go(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()


def in_turns(vocab: int, beta: float, turns: int) -> dict[str, Any]:
    """Let the three trainers take turns; return what each of them took."""
    names = list(TRAINERS)
    children = {name: Child(name, vocab, beta, turns + WARM_UP) for name in names}
    took: dict[str, list[dict[str, Any]]] = {name: [child.hear()] for name, child in children.items()}
    for turn in range(1, turns + WARM_UP):
        for name in names[turn % 3 :] + names[: turn % 3]:
            children[name].go()
            took[name].append(children[name].hear())
    found = {}
    for name, child in children.items():
        child.go()
        steps, memory = took[name][WARM_UP:], child.hear()
        seconds = [step["seconds"] for step in steps]
        found[name] = {
            "tokens_per_second": BATCH * NEW / median(seconds),
            "seconds": seconds,
            "cpu_seconds": [step["cpu_seconds"] for step in steps],
            "generating_share": sum(step["generating"] for step in steps) / sum(seconds),
            "first_loss": took[name][0]["loss"],
            **memory,
        }
        child.process.wait()
    return found


def alone(way: str, vocab: int, steps: int) -> dict[str, Any]:
    """Let one of kdlm's ways to make text run by itself."""
    child = Child(way, vocab, 1.0, steps)
    heard = [child.hear() for _ in range(steps)]
    memory = child.hear()
    child.process.wait()
    skipped = 4  # a whole round of `every 4`, and a multiple of the others'
    seconds = sum(step["seconds"] for step in heard[skipped:])
    return {
        "tokens_per_second": BATCH * NEW * (steps - skipped) / seconds,
        "waiting_share": (heard[-1]["waited"] - heard[skipped - 1]["waited"]) / seconds,
        **memory,
    }


def judged(found: dict[str, Any]) -> dict[str, Any]:
    """Return kdlm's speed over the faster one's, and its memory over the leaner one's."""
    others = [name for name in TRAINERS if name != "kdlm"]
    for name in others:
        for key, seconds in ("kdlm_is_faster", "seconds"), ("kdlm_is_faster_cpu", "cpu_seconds"):
            pairs = zip(found[name][seconds], found["kdlm"][seconds], strict=True)
            found[name][key] = median(theirs / ours for theirs, ours in pairs)
    ratios = {key: found["kdlm"][key] / min(found[name][key] for name in others) for key in ("peak_mib", "extra_mib")}
    return {"speed": min(found[name]["kdlm_is_faster"] for name in others), **ratios}


def check_same_work(found: dict[str, Any]) -> None:
    """Exit where the first losses, each over its own samples, are further apart than those of equal work."""
    losses = [row["first_loss"] for row in found.values()]
    if max(losses) > 1.1 * min(losses):
        sys.exit(f"the trainers do not compute the same loss: {losses}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer turns, reverse KL only; a smoke test")
    parser.add_argument("--check", action="store_true", help="exit 1 when kdlm is slower or takes more memory")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/on_policy_throughput.json")
    parser.add_argument("--point", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.point:
        out, sys.stdout = sys.stdout, sys.stderr  # libraries print, too
        which, vocab, beta, steps = args.point
        child(which, int(vocab), float(beta), int(steps), lambda said: print(json.dumps(said), file=out, flush=True))
        return 0
    turns = 5 if args.quick else 30
    points = []
    columns = ("tokens/s", "kdlm is", "cpu", "generating", "peak MiB", "extra MiB", "loss")
    print(f"{'':<24}{''.join(f'{column:>11}' for column in columns)}")
    for vocab, beta in POINTS[:2] if args.quick else POINTS:
        print(f"{vocab:,} ids, beta {beta}")
        found = in_turns(vocab, beta, turns)
        check_same_work(found)
        points.append({"vocab": vocab, "beta": beta, "kdlm_to_best": judged(found), **found})
        for name, row in found.items():
            print(
                f"  {name:<22}{row['tokens_per_second']:>11,.0f}{row.get('kdlm_is_faster', 1):>10.3f}x"
                f"{row.get('kdlm_is_faster_cpu', 1):>10.3f}x{row['generating_share']:>11.1%}"
                f"{row['peak_mib']:>11.0f}{row['extra_mib']:>11.0f}{row['first_loss']:>11.4f}",
                flush=True,
            )
    vocabs, asked = ([2048], ["every 1", "every 1, asynchronous"]) if args.quick else ([2048, 32_768], list(WAYS))
    ways = {vocab: {way: alone(way, vocab, 12 if args.quick else 44) for way in asked} for vocab in vocabs}
    print(f"{'':<24}{'tokens/s':>10}{'waiting':>10}{'peak MiB':>10}")
    for vocab, rows in ways.items():
        print(f"{vocab:,} ids, beta 1.0")
        for way, row in rows.items():
            print(f"  {way:<22}{row['tokens_per_second']:>10,.0f}{row['waiting_share']:>10.1%}{row['peak_mib']:>10.0f}")
    figures = [point["kdlm_to_best"] for point in points]
    speed, memory = min(row["speed"] for row in figures), max(row["peak_mib"] for row in figures)
    if args.save:
        save({"speed": speed, "peak_memory": memory, "turns": turns, "points": points, "ways": ways})
    print(f"kdlm trains at least {speed:.3f} times the faster TRL trainer's tokens/s, in at most {memory:.3f} of the")
    print(f"leaner one's memory (gate: 1 and 1): {speed:.3f} {memory:.3f}")
    return int(args.check and (speed < 1 or memory > 1))


def save(results: dict[str, Any]) -> None:
    from machine import described

    shape = {"batch": BATCH, "new_tokens": NEW, "student": STUDENT, "teacher": TEACHER}
    path = ROOT / "benchmarks" / "results" / "on_policy_throughput.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"machine": described(), "threads": 1, "shape": shape, **results}, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
