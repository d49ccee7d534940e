"""What `kdlm plan --gpus` says that a rank holds and sends, beside what gloo ranks hold and send.

    python benchmarks/plan_sharded.py [--quick] [--check] [--save]

Recipes of `plan_memory.py` (random weights: a student of 15 M, a teacher of 25 M, fp32) train for six steps on
one, two and four processes, by each strategy. Each rank asserts that the world is what was started. The first step, in
which the optimiser gets its state, is left out; the others are the repeats.

- sent: every collective of torch.distributed that a step makes, seen by a TorchDispatchMode on c10d's
  operations, DDP's own among them. Bytes are those of a ring, as `kdlm.plan.communication` counts: 2 (n - 1) / n of an
  all-reduce's tensor, (n - 1) / n of what an all-gather gives and a reduce-scatter takes, and of a broadcast or reduce
  (its mean over the ranks). gloo may do otherwise inside.
- memory: what malloc has handed out in blocks beyond 64 KiB (`mallinfo2`), read after every operation of a step, beyond
  what it had before the networks were built, and files of weights that are mapped; the most in a step, of the rank that
  holds the most. It is of all threads.
  torch's profiler is not: gloo's threads free what a collective held, the profiler does not see that, and its sum grows
  from step to step, the more the busier the machine is. Of the plan, its tensors.
- rise: how much of that comes on top of what is held between steps, and the same of the resident set, as the kernel
  keeps its peak (VmHWM). They differ where a buffer is allocated and not filled, as DeepSpeed's.

accelerate gives FSDP to GPUs alone: as in the tests, the ranks are called GPUs while it asks.

--check exits 1 unless the median of memory is within 15 % and bytes within 5 %. --quick takes two ranks of DDP and
FSDP2. The figure is the largest error of the memory.
"""

import argparse
import ctypes
import json
import os
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent
TESTS = ROOT / "tests"
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(HERE), str(TESTS), str(TESTS / "trainer")]
MEMORY_GATE, SENT_GATE = 0.15, 0.05
VOCAB, STEPS = 4_000, 6
SETUPS: dict[str, tuple[str, dict[str, Any]]] = {
    "fsdp2, teacher sharded": ("fsdp2", {"teacher.placement": "sharded"}),
    "fsdp2, accumulation 2": (
        "fsdp2",
        {"teacher.placement": "sharded", "training.gradient_accumulation_steps": 2},
    ),
    "ddp": ("ddp", {}),
    "ddp, teacher sharded": ("ddp", {"teacher.placement": "sharded"}),
    "zero2, teacher sharded": ("zero2", {"teacher.placement": "sharded"}),
}
QUICK = ("ddp", "fsdp2, teacher sharded")


def recipe_of(setup: str, folder: Path, run: Path) -> Any:
    """Return a set-up's recipe: of a run, or, without its strategy, of one process."""
    import plan_memory

    plan_memory.STEPS = STEPS
    plan_memory.SETUPS[setup] = {"training.per_device_train_batch_size": 2, **SETUPS[setup][1]}
    recipe = plan_memory.recipe_of(setup, folder, "sharded")
    return recipe.model_copy(update={"run_dir": run})


def as_strategy(recipe: Any, strategy: str) -> Any:
    """Return the recipe, which asks for a strategy."""
    from kdlm.plan import changed

    if strategy == "fsdp2":
        from cpu_sharding import shards_on_cpus

        shards_on_cpus()
        return changed(recipe, {"training.fsdp": True, "training.fsdp_config": {"version": 2}})
    if strategy.startswith("zero"):
        from zero_cases import zero

        return changed(recipe, {"training.deepspeed": zero(int(strategy[-1]))})
    return recipe


class Malloc(ctypes.Structure):
    """What glibc's `mallinfo2` gives; `hblkhd` is the bytes of blocks that are mapped one by one."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    ]


def handed_out() -> int:
    """Return the bytes of all large blocks that this process holds now."""
    asked = ctypes.CDLL(None).mallinfo2
    asked.restype = Malloc
    return asked().hblkhd


def mapped() -> int:
    """Return the bytes of files of weights that are mapped: one process leaves a teacher's weights where they lie."""
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if ".safetensors" in line]
    ranges = [[int(end, 16) for end in line[0].split("-")] for line in lines]
    return sum(end - start for start, end in ranges)


def counter(ranks: int) -> Any:
    """Return a mode that counts the bytes that this rank sends, `sent`, by operation, and the most it holds, `peak`."""
    from collections import Counter

    from torch import Tensor
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_iter

    share = (ranks - 1) / ranks
    rules = {  # operation: which argument holds the whole (None: what it gives), and how often its share is sent
        "allreduce_": (0, 2), "_allgather_base_": (0, 1), "_reduce_scatter_base_": (1, 1), "broadcast_": (0, 1),
        "allgather_": (0, 1), "reduce_": (0, 1), "reduce_scatter_": (1, 1), "all_gather_into_tensor": (None, 1),
        "all_gather_into_tensor_out": (None, 1), "reduce_scatter_tensor": (0, 1), "all_reduce": (0, 2),
        "all_reduce_": (0, 2), "broadcast": (0, 1), "allgather_into_tensor_coalesced_": (0, 1),
        "reduce_scatter_tensor_coalesced_": (1, 1), "allreduce_coalesced_": (0, 2), "alltoall_base_": (1, 1),
    }  # fmt: skip
    silent = {"barrier", "wait_tensor", "monitored_barrier_", "_wrap_tensor_autograd"}

    class Counting(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.sent: Counter[str] = Counter()
            self.peak = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            self.peak = max(self.peak, handed_out())
            name = func._opname
            if func.namespace in ("c10d", "_c10d_functional") and name not in silent:
                at, times = rules[name]  # a collective that is not known ends the run
                tensors = [leaf for leaf in tree_iter(out if at is None else args[at]) if isinstance(leaf, Tensor)]
                self.sent[name] += times * share * sum(t.numel() * t.element_size() for t in tensors)
            return out

    return Counting()


def one_rank(folder: Path, setup: str) -> None:
    """Train on this rank, and leave what it sent and held in every step but the first."""
    import torch
    from loss_memory_cpu import resident
    from transformers import TrainerCallback

    from kdlm.train import assemble

    torch.set_num_threads(1)
    ranks, rank = int(os.environ.get("WORLD_SIZE", "1")), os.environ.get("RANK", "0")
    recipe = as_strategy(recipe_of(setup, folder.parent, folder / "run"), SETUPS[setup][0] if ranks > 1 else "ddp")
    counting, before, steps = counter(ranks), handed_out(), []

    class Steps(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.rest, self.pages = handed_out(), resident("VmRSS")
            counting.sent.clear()
            counting.peak = 0
            Path("/proc/self/clear_refs").write_text("5")  # starts VmHWM anew

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            rise = {"allocated": counting.peak - self.rest, "resident": resident("VmHWM") - self.pages}
            steps.append({"sent": dict(counting.sent), "allocated": counting.peak - before + mapped(), "rise": rise})

    trainer = assemble(recipe).trainer
    assert trainer.args.world_size == ranks
    if ranks > 1:
        assert torch.distributed.get_world_size() == ranks and torch.distributed.get_backend() == "gloo"
    trainer.add_callback(Steps())
    with counting:
        trainer.train()
    assert len(steps) == STEPS
    (folder / f"rank-{rank}.json").write_text(json.dumps(steps[1:]))


def compared(setup: str, ranks: int, folder: Path) -> dict[str, Any]:
    """Run a set-up, print its line, and return what was measured and foreseen."""
    from forks import on_ranks

    from kdlm.plan import STRATEGIES, changed, device, per_rank, predict, sent

    here = folder / f"{setup} {ranks}"
    here.mkdir()
    on_ranks(ranks, Path(__file__), here, setup, seconds=1200)
    told = [json.loads((here / f"rank-{rank}.json").read_text()) for rank in range(ranks)]
    resident = changed(recipe_of(setup, folder, here), {"teacher.placement": "resident"})
    alone, strategy = predict(resident, replace(device("cpu"), apart=True)), STRATEGIES[SETUPS[setup][0]]
    sharded = SETUPS[setup][1].get("teacher.placement") == "sharded"
    rank = per_rank(alone, ranks, strategy, sharded_teacher=sharded)
    amounts = sent(alone, ranks, strategy, sharded_teacher=sharded)
    steps = [max(ones, key=lambda one: one["allocated"]) for ones in zip(*told, strict=True)]
    held = [step["allocated"] for step in steps]
    measured = sum(sum(one["sent"].values()) for ones in told for one in ones) / ranks / len(steps)
    row: dict[str, Any] = {"setup": setup, "ranks": ranks, "peak": rank.peak, "parts": dict(rank.parts)}
    row["phases"] = {name: sum(parts.values()) for name, parts in rank.phases.items()}
    row["memory"] = {"predicted": rank.tensors, "allocated": statistics.median(held), "steps": held}
    row["memory"]["rise"] = [step["rise"] for step in steps]
    row["sent"] = {"predicted": sum(amounts.values()), "counted": measured}
    row["sent"] |= {"by_purpose": dict(amounts), "by_operation": told[0][-1]["sent"]}
    row["errors"] = {"memory": row["memory"]["predicted"] / row["memory"]["allocated"] - 1}
    row["errors"]["sent"] = row["sent"]["predicted"] / measured - 1 if measured else 0.0
    figures = (rank.tensors, row["memory"]["allocated"], min(held), max(held), row["sent"]["predicted"], measured)
    errors = row["errors"]
    line = "".join(f"{value / 2**20:>10.1f}" for value in figures)
    print(f"{setup:<26}{ranks}{line}{errors['memory']:>+9.1%}{errors['sent']:>+9.1%}  {rank.peak}", flush=True)
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two ranks of DDP and FSDP2")
    parser.add_argument("--check", action="store_true", help="exit 1 where a gate is missed")
    parser.add_argument("--save", action="store_true", help="write the results")
    options = parser.parse_args()
    import plan_memory

    plan_memory.VOCAB = VOCAB
    os.environ |= plan_memory.ENVIRONMENT  # of the ranks, which are started later
    heads = ("plan", "allocated", "least", "most", "sent", "counted")
    print(f"{'MiB of a rank':<27}{''.join(f'{head:>10}' for head in heads)}{'errors':>18}")
    rows = []
    with tempfile.TemporaryDirectory(prefix="kdlm-ranks-") as name:
        plan_memory.write_inputs(Path(name))
        worlds = [(setup, 2) for setup in QUICK]
        if not options.quick:
            worlds = [("ddp", 1), *[(setup, ranks) for setup in SETUPS for ranks in (2, 4)]]
        for setup, ranks in worlds:
            rows.append(compared(setup, ranks, Path(name)))
            if options.save:
                from machine import described

                results = {"machine": described() | {"threads": 1}, "rows": rows}
                results["gates"] = {"memory": MEMORY_GATE, "sent": SENT_GATE}
                (HERE / "results" / "plan_sharded.json").write_text(json.dumps(results, indent=2) + "\n")
    sent = max(abs(row["errors"]["sent"]) for row in rows)
    memory = max(abs(row["errors"]["memory"]) for row in rows)
    print(f"largest error of the bytes sent, {len(rows)} set-ups (gate {SENT_GATE:.0%}): {sent:.1%}")
    print(f"largest error of a rank's memory, {len(rows)} set-ups (gate {MEMORY_GATE:.0%}): {memory:.1%}")
    return int(options.check and (memory > MEMORY_GATE or sent > SENT_GATE))


if __name__ == "__main__":
    if "RANK" in os.environ or (len(sys.argv) == 3 and sys.argv[2] in SETUPS):
        one_rank(Path(sys.argv[1]), sys.argv[2])
        if "RANK" in os.environ:
            import torch

            torch.distributed.barrier()
            sys.stdout.flush()
            os._exit(0)
    else:
        sys.exit(main())
