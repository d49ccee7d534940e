"""The same run on one process and on gloo ranks, sharded in every way: do loss and weights stay, and does memory fall?

    python benchmarks/rank_invariance.py [--quick] [--check] [--save]

Rows are method x strategy x ranks (`tests/trainer/sharded_runs.py` has both tables): six AdamW steps in fp32 on the
same global batch of eight, clipped, one step in which a rank has no token to train on. Each rank asserts that the world
is what was started and that it holds its share of every tensor; a row gives the largest relative difference to one
process of a step's loss, and of a tensor's weights at the end. Checkpoints: what two ranks saved after three of the
six steps goes on with four and with one, to the same end.

Memory: a teacher of 30 M weights (122 MB in fp32), whole on every rank, and sharded: what a rank's resident set has
grown by, beyond its start, when it has answered three batches (glibc gives freed blocks beyond 64 KiB back). The gate
is on what sharding saves a rank, beside the teacher's bytes times (1 - 1 / ranks). A rank that has answered holds its
shards alone: what it gathers comes on top while it answers, one layer at a time and then the head.

--check exits 1 unless every difference of a loss is at most 1e-5 and what is saved within 15 % of that; --quick takes
two methods on two ranks, and no checkpoints. The figure is the largest difference of a loss.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
TESTS = ROOT / "tests"
SCRIPT = TESTS / "trainer" / "sharded_runs.py"
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(TESTS), str(TESTS / "trainer")]
GATE, MEMORY_GATE, SAVED = 1e-5, 0.15, 3
WIDE = {"hidden": 512, "layers": 6, "vocab": 16_000}
ENVIRONMENT = {
    **{"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"},
    **{"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"},
}


def rows(methods: list[str], counts: tuple[int, ...], folder: Path) -> list[dict[str, Any]]:
    """Return a row for each method, strategy and number of ranks; one process's runs lie in the folder, by method."""
    import sharded_runs
    from forks import on_ranks

    found = []
    for strategy in [name for name in sharded_runs.STRATEGIES if name != "one process"]:
        for ranks in counts:
            (here := folder / f"{strategy} {ranks}").mkdir()
            on_ranks(ranks, SCRIPT, here, strategy, *methods, seconds=900)
            found += [compared(here, folder, method, strategy, ranks) for method in methods]
    return found


def resumed(methods: list[str], folder: Path) -> list[dict[str, Any]]:
    """Return a row for each method, strategy and number of ranks that goes on where two ranks have saved."""
    import sharded_runs
    from forks import on_ranks

    found = []
    for strategy in ("ddp", "fsdp2", "fsdp2, sharded checkpoints", "zero1", "zero2", "zero3"):
        (saved := folder / f"{strategy} saved").mkdir()
        on_ranks(2, SCRIPT, saved, strategy, "save", str(SAVED), *methods, seconds=900)
        for ranks in (4, 1):
            (here := folder / f"{strategy} resumed {ranks}").mkdir()
            by = (
                "one process"
                if ranks == 1 and "deepspeed" not in sharded_runs.STRATEGIES[strategy].options
                else strategy
            )
            on_ranks(ranks, SCRIPT, here, by, "resume", str(saved), str(SAVED), *methods, seconds=900)
            found += [compared(here, folder, method, strategy, ranks) | {"saved_on": 2} for method in methods]
    return found


def compared(here: Path, alone: Path, method: str, strategy: str, ranks: int) -> dict[str, Any]:
    """Return how far a run is from one process's, and the largest share that a rank held."""
    import sharded_runs

    curve, weights = sharded_runs.differences(sharded_runs.read(here / method), sharded_runs.read(alone / method))
    held = [json.loads((here / method / f"rank-{rank}.json").read_text()) for rank in range(ranks)]
    shares = {part: max(one[part][0] / one[part][1] for one in held) for part in held[0]}
    told = "  ".join(f"{part} {share:.3f}" for part, share in shares.items())
    print(f"{method:<22}{here.name:<40}{curve:.1e}  {weights:.1e}   {told}", flush=True)
    return {
        **{"method": method, "strategy": strategy, "ranks": ranks},
        **{"loss": curve, "weights": weights, "largest_share": shares},
    }


def memory(quick: bool, folder: Path) -> list[dict[str, Any]]:
    """Return what a rank's resident set grows by with the teacher, whole and sharded."""
    found = []
    for placement, ranks in (("resident", 2), ("sharded", 2), ("sharded", 4))[: 2 if quick else 3]:
        here = folder / f"memory {placement} {ranks}"
        here.mkdir()
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        words = [str(Path(__file__)), "--teacher", placement, "--folder", str(here)]
        paths = os.pathsep.join(sys.path[:4])
        done = subprocess.run(
            [*launch, *words], env=os.environ | ENVIRONMENT | {"PYTHONPATH": paths}, capture_output=True
        )
        if done.returncode:
            raise RuntimeError(done.stderr.decode()[-3000:])
        told = [json.loads((here / f"{rank}.json").read_text()) for rank in range(ranks)]
        whole = told[0]["bytes"]
        row = {
            "placement": placement,
            "ranks": ranks,
            "teacher_bytes": whole,
            "share_bytes": whole // (ranks if placement == "sharded" else 1),
            "held_bytes": max(one["held"] for one in told),
            "grown_bytes": max(one["grown"] for one in told),
        }
        found.append(row)
        grown, share = row["grown_bytes"] / 2**20, row["share_bytes"] / 2**20
        print(
            f"teacher {placement:<10}{ranks} ranks: {grown:.1f} MiB resident on a rank, its share {share:.1f}",
            flush=True,
        )
    return found


def teacher_alone(placement: str, folder: Path) -> None:
    """One rank: load the teacher, let it answer, and write what the process has grown by."""
    import gc

    import psutil
    import torch
    import torch.distributed as dist
    from tiny_models import tiny_model

    from kdlm.losses import kept_rows
    from kdlm.sharding import held, sharded
    from kdlm.teachers import LocalTeacher

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, device = dist.get_rank(), torch.device("cpu")

    def load(device_map: Any = None, **sizes: Any) -> Any:
        with torch.device("cpu" if device_map is None else "meta"):
            return tiny_model(2, **(sizes or WIDE))

    def answered(**sizes: Any) -> Any:
        from functools import partial

        made = partial(load, **sizes)
        on = device if placement == "sharded" else None
        teacher = LocalTeacher(sharded(made, device) if on else made(), computes_on=on)
        ids = torch.arange(1, 33)[None].expand(2, -1)
        for _ in range(3):
            teacher({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, kept_rows(ids))
        gc.collect()
        return teacher

    answered(hidden=32, layers=2, vocab=64)  # what code and communication take is not the teacher's
    before = psutil.Process().memory_info().rss
    teacher = answered()
    here, everything = held(teacher.model.parameters())
    dist.barrier()
    time.sleep(1)  # gloo's threads let the last gather go when they next come to run
    grown = psutil.Process().memory_info().rss - before
    (folder / f"{rank}.json").write_text(json.dumps({"held": here * 4, "bytes": everything * 4, "grown": grown}))
    dist.barrier()
    dist.destroy_process_group()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two methods on two ranks")
    parser.add_argument("--check", action="store_true", help="exit 1 where a gate is missed")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/rank_invariance.json")
    parser.add_argument("--teacher", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.teacher:
        teacher_alone(args.teacher, args.folder)
        return 0
    from forks import on_ranks
    from sharded_runs import METHODS

    methods = ["logit_kd", "two networks"] if args.quick else list(METHODS)
    with tempfile.TemporaryDirectory() as name:
        held = memory(args.quick, folder := Path(name))
        on_ranks(1, SCRIPT, folder, "one process", *methods, seconds=900)
        found = rows(methods, (2,) if args.quick else (2, 4), folder)
        again = [] if args.quick else resumed(methods, folder)
    if args.save:
        from machine import described

        path = ROOT / "benchmarks" / "results" / "rank_invariance.json"
        gates = {"loss": GATE, "memory": MEMORY_GATE}
        path.write_text(
            json.dumps(
                {"machine": described(), "gates": gates, "rows": found, "resumed": again, "memory": held}, indent=1
            )
            + "\n"
        )
    whole = next(row for row in held if row["placement"] == "resident")
    off = max(
        abs((whole["grown_bytes"] - row["grown_bytes"]) / (row["teacher_bytes"] - row["share_bytes"]) - 1)
        for row in held
        if row is not whole
    )
    worst = max(row["loss"] for row in found + again)
    print(f"memory that sharding saves a rank, beside its share (gate {MEMORY_GATE:.0%}): {off:.1%} off")
    of = f"{len(found)} rows and {len(again)} resumed"
    print(f"largest relative difference of a loss, {of} (gate {GATE:.0e}): {worst:.1e}")
    return int(args.check and (worst > GATE or off > MEMORY_GATE))


if __name__ == "__main__":
    sys.exit(main())
