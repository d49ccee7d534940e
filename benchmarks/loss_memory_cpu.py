"""Memory and time of a token divergence from hidden states on a CPU: kdlm beside eager torch, TRL and Liger.

    python benchmarks/loss_memory_cpu.py [--quick] [--check]

Forward and backward at 1,024 rows x 151,936 ids, student width 512, teacher width 1,024, fp32, both heads without
bias, the student's trained. Each point runs in a process of its own, once to warm up, then for time and memory (the
least of the repeats of each). Extra memory is the peak of the resident set beyond what was resident before the call
and beyond the gradients, which every way has to return. The floor is the four matrix products that none can avoid,
timed before and after everything else. Eager is kdlm's own function on whole logits, torch plain torch.

--check exits 1 unless kdlm, for every divergence, takes at most 1.4 times the floor's time, is at least as fast as the
fastest other way and takes no more extra memory than the leanest, and for forward KL at most 1/8 of eager's.
"""

import argparse
import ctypes
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROWS, VOCAB, STUDENT, TEACHER = 1024, 151_936, 512, 1024
FLOOR_GATE, MEMORY_GATE = 1.4, 1 / 8
HERE = Path(__file__).parent
OTHERS = {
    "forward_kl": ("torch", "eager", "trl", "liger"),
    "reverse_kl": ("eager", "trl", "liger"),
    "generalised_jsd": ("eager", "trl", "liger"),
    **dict.fromkeys(
        ("skew_kl", "skew_reverse_kl", "total_variation", "adaptive_kl", "alpha_mixture", "taid_kl"), ("eager",)
    ),
}
QUICK = ("forward_kl", "generalised_jsd", "adaptive_kl")
BETA = {"forward_kl": 0.0, "generalised_jsd": 0.5, "reverse_kl": 1.0}


def floor(hidden, weight, teacher_hidden, teacher_weight) -> None:
    """The four products, with the first one's result in the place of the gradient to the logits."""
    import torch

    with torch.no_grad():
        logits = hidden @ weight.T
        hidden.grad = logits @ weight
        weight.grad = logits.T @ hidden
        torch.mm(teacher_hidden, teacher_weight.T, out=logits)


def plain(name: str, hidden, weight, teacher_hidden, teacher_weight) -> None:
    """Forward KL as one writes it in torch, which keeps fewer tensors than kdlm's function on whole logits."""
    import torch
    import torch.nn.functional as F

    with torch.no_grad():
        log_p = F.log_softmax(teacher_hidden @ teacher_weight.T, -1)
    F.kl_div(F.log_softmax(hidden @ weight.T, -1), log_p, log_target=True, reduction="sum").backward()


def eager(name: str, hidden, weight, teacher_hidden, teacher_weight) -> None:
    import torch

    with torch.no_grad():
        teacher = teacher_hidden @ teacher_weight.T
    divergence(name)(hidden @ weight.T, teacher).sum().backward()


def kdlm(name: str, hidden, weight, teacher_hidden, teacher_weight) -> None:
    from kdlm.losses import chunked
    from kdlm.signal import Head, Hidden

    student, teacher = Hidden(hidden, Head(weight)), Hidden(teacher_hidden, Head(teacher_weight))
    chunked(divergence(name), student, teacher).sum().backward()


def trl(name: str, hidden, weight, teacher_hidden, teacher_weight) -> None:
    import torch
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    mask = torch.ones(1, ROWS, dtype=torch.long)
    loss, _, _ = _chunked_divergence_loss(
        hidden[None], teacher_hidden[None], weight, teacher_weight, mask, beta=BETA[name], num_items_in_batch=1
    )
    loss.backward()


def liger(name: str, hidden, weight, teacher_hidden, teacher_weight) -> None:
    import torch
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=BETA[name])
    loss(hidden, weight, teacher_hidden, teacher_weight, torch.zeros(ROWS, dtype=torch.long)).backward()


def divergence(name: str) -> Callable:
    import kdlm.losses

    function = getattr(kdlm.losses, name)
    return partial(function, t=0.5) if name == "taid_kl" else function


def resident(key: str) -> int:
    """Bytes of a field of this process: VmRSS (now) or VmHWM (highest since the last reset)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))


def point(which: str, repeats: int) -> dict[str, float]:
    """Measure one point; runs in its own process."""
    import torch

    way, _, name = which.removesuffix(" again").partition(":")
    ways = {"floor": floor, "torch": plain, "eager": eager, "kdlm": kdlm, "trl": trl, "liger": liger}
    run = partial(ways[way], name) if name else ways[way]
    torch.manual_seed(0)
    hidden = torch.randn(ROWS, STUDENT, requires_grad=True)
    weight = torch.nn.Parameter(torch.randn(VOCAB, STUDENT) / STUDENT**0.5)
    inputs = hidden, weight, torch.randn(ROWS, TEACHER), torch.randn(VOCAB, TEACHER) / TEACHER**0.5

    def once() -> float:
        hidden.grad = weight.grad = None
        start = time.perf_counter()
        run(*inputs)
        return time.perf_counter() - start

    once()
    gradients = sum(x.grad.numel() * x.grad.element_size() for x in (hidden, weight))
    seconds, extra = [], []
    for _ in range(repeats):
        hidden.grad = weight.grad = None
        ctypes.CDLL(None).malloc_trim(0)  # freed pages that malloc keeps would hide what the next call takes
        for x in inputs:
            x.detach().sum()  # a system short of memory takes pages that nobody read for a while
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # starts VmHWM anew
        seconds.append(once())
        extra.append(resident("VmHWM") - before - gradients)
    return {"point": which, "extra_mib": min(extra) / 2**20, "seconds": min(seconds)}


def machine() -> dict[str, Any]:
    import torch
    from machine import described

    return described() | {"liger-kernel": version("liger-kernel"), "threads": torch.get_num_threads()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="forward KL, JSD and adaptive KL only, one repeat")
    parser.add_argument("--check", action="store_true", help="exit 1 where a bound does not hold")
    parser.add_argument("--point", help=argparse.SUPPRESS)
    options = parser.parse_args()
    repeats = 1 if options.quick else 2
    if options.point:
        print(json.dumps(point(options.point, repeats)))
        return 0
    names = QUICK if options.quick else tuple(OTHERS)
    ways = [f"{way}:{name}" for name in names for way in ("kdlm", *OTHERS[name])]
    print(f"{'point':<26}{'extra MiB':>10}{'seconds':>9}")
    rows = {which: found for which in ("floor", *ways, "floor again") if (found := measured(which, options.quick))}
    floor_seconds = min(rows["floor"]["seconds"], rows["floor again"]["seconds"])
    shape = {"rows": ROWS, "vocab": VOCAB, "student_width": STUDENT, "teacher_width": TEACHER, "dtype": "float32"}
    results = {"machine": machine(), "shape": shape, "points": list(rows.values())}
    (HERE / "results").mkdir(exist_ok=True)
    (HERE / "results" / "loss_memory_cpu.json").write_text(json.dumps(results, indent=2) + "\n")
    return int(not judged(names, rows, floor_seconds) and options.check)


def measured(which: str, quick: bool) -> dict[str, Any] | None:
    """Run a point in a process of its own and print its line; None where it fails, with the reason."""
    command = [sys.executable, __file__, "--point", which, *(["--quick"] if quick else [])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE.parent), *sys.path[1:]])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        why = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        print(f"{which:<26} failed: {why[0]}")
        return None
    found = json.loads(done.stdout.splitlines()[-1])
    print(f"{which:<26}{found['extra_mib']:>10.0f}{found['seconds']:>9.2f}", flush=True)
    return found


def judged(names: tuple[str, ...], rows: dict[str, dict[str, Any]], floor_seconds: float) -> bool:
    """Print how kdlm compares for each divergence; return whether every bound holds."""
    print(f"{'kdlm':<26}{'of floor':>10}{'of fastest':>12}{'of leanest':>12}")
    held, worst = True, 0.0
    for name in names:
        ours = rows[f"kdlm:{name}"]
        others = [found for way in OTHERS[name] if (found := rows.get(f"{way}:{name}"))]
        of_floor = ours["seconds"] / floor_seconds
        duration, memory = (ours[key] / min(other[key] for other in others) for key in ("seconds", "extra_mib"))
        print(f"{name:<26}{of_floor:>10.2f}{duration:>12.2f}{memory:>12.2f}")
        held &= of_floor <= FLOOR_GATE and duration <= 1 and memory <= 1
        worst = max(worst, of_floor)
    memory = rows["kdlm:forward_kl"]["extra_mib"] / rows["eager:forward_kl"]["extra_mib"]
    print(f"worst of {len(names)}: {worst:.2f} of the four products' time; forward KL: {memory:.3f} of eager's memory")
    return held and memory <= MEMORY_GATE


if __name__ == "__main__":
    sys.exit(main())
