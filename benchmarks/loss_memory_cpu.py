"""Memory and time of a token divergence from hidden states on a CPU: kdlm beside eager torch, TRL and Liger.

    python benchmarks/loss_memory_cpu.py [--quick] [--check]

Forward and backward at 1,024 rows x 151,936 ids, student width 512, teacher width 1,024, fp32, both heads without
bias, the student's trained. Each point runs in a process of its own: once to warm up, once for memory, then for time
(the shortest of the repeats). Extra memory is the peak of the resident set beyond what was resident before the call
and beyond the gradients, which every way has to return. The floor is the four matrix products that none can avoid.
Eager is kdlm's own function on whole logits, torch plain torch. --check exits 1 unless kdlm's chunked forward KL takes
at most 1/8 of the extra memory of the leaner of these two and 1.2 times the time of the faster.
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
MEMORY_GATE, TIME_GATE = 1 / 8, 1.2
HERE = Path(__file__).parent
QUICK = [
    "floor",
    "torch:forward_kl",
    *(f"{way}:{name}" for name in ("forward_kl", "generalised_jsd") for way in ("eager", "kdlm", "trl", "liger")),
    *("eager:total_variation", "kdlm:total_variation"),
]
FULL = [
    *QUICK,
    *(
        f"{way}:{name}"
        for name in ("reverse_kl", "skew_kl", "skew_reverse_kl", "adaptive_kl", "alpha_mixture", "taid_kl")
        for way in ("eager", "kdlm")
    ),
    "trl:reverse_kl",
]
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

    way, _, name = which.partition(":")
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
    hidden.grad = weight.grad = None
    ctypes.CDLL(None).malloc_trim(0)  # freed pages that malloc keeps would hide what the next call takes
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # starts VmHWM anew
    once()
    extra = resident("VmHWM") - before - gradients
    return {"point": which, "extra_mib": extra / 2**20, "seconds": min(once() for _ in range(repeats))}


def machine() -> dict[str, Any]:
    import torch
    from machine import described

    return described() | {"liger-kernel": version("liger-kernel"), "threads": torch.get_num_threads()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="forward KL, JSD and TVD only, timed once")
    parser.add_argument("--check", action="store_true", help="exit 1 where a bound is broken")
    parser.add_argument("--point", help=argparse.SUPPRESS)
    options = parser.parse_args()
    repeats = 1 if options.quick else 3
    if options.point:
        print(json.dumps(point(options.point, repeats)))
        return 0
    rows = {}
    print(f"{'point':<26}{'extra MiB':>10}{'seconds':>9}")
    for which in QUICK if options.quick else FULL:
        command = [sys.executable, __file__, "--point", which, *(["--quick"] if options.quick else [])]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE.parent), *sys.path[1:]])}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            print(f"{which:<26} failed: {done.stderr.strip().splitlines()[-1]}")
            continue
        rows[which] = json.loads(done.stdout.splitlines()[-1])
        print(f"{which:<26}{rows[which]['extra_mib']:>10.0f}{rows[which]['seconds']:>9.2f}", flush=True)
    ours, others = rows["kdlm:forward_kl"], (rows["torch:forward_kl"], rows["eager:forward_kl"])
    memory, duration = (ours[key] / min(other[key] for other in others) for key in ("extra_mib", "seconds"))
    shape = {"rows": ROWS, "vocab": VOCAB, "student_width": STUDENT, "teacher_width": TEACHER, "dtype": "float32"}
    results = {"machine": machine(), "shape": shape, "points": list(rows.values())}
    (HERE / "results").mkdir(exist_ok=True)
    (HERE / "results" / "loss_memory_cpu.json").write_text(json.dumps(results, indent=2) + "\n")
    print(f"forward KL, kdlm chunked: {memory:.3f} of eager's extra memory, {duration:.2f} of its time")
    return int(options.check and not (memory <= MEMORY_GATE and duration <= TIME_GATE))


if __name__ == "__main__":
    sys.exit(main())
