"""Time, memory and accuracy of token divergences on one CUDA GPU: kdlm_kernels beside plain torch, TRL and Liger.

    python benchmarks/loss_gpu.py [--quick] [--check]

Forward and backward from bf16 hidden states and heads, the student's head trained (--quick: one pair of models, two
numbers of rows, three divergences, no file). The floor is the four products that none can avoid (both projections, the
gradients to hidden states and head), in bf16 by cuBLAS, over chunks of as many rows as kdlm_kernels takes, so that they
fit into memory; it is timed between the repeats of every way. Extra memory is the peak beyond what was allocated before
the call and beyond the two bf16 gradients, which every way returns. Cross-entropy has no teacher and is left out.

torch is each formula on whole logits, all in bf16; trl is TRL's chunked divergence, in its Triton path; liger is the
fastest of what Liger has for a divergence: its chunked loss (compiled), fused linear JSD, fused linear KL beside whole
teacher probabilities, and JSD and TVD on whole logits. The JSON has each. The gradient error is the norm of the
difference from float64 at 512 rows x 32,768 ids, logits of standard deviation 4; torch's softmax is bf16 or fp32 there,
whichever is better.

--check exits 1 unless kdlm_kernels takes at most 1.15 times the floor, 1 GiB of extra memory, 1 / 1.5 of the time of
the better of TRL and Liger (where they have the divergence), and has at most 1.05 times torch's gradient error. Without
a CUDA GPU nothing is measured, checked or written.
"""

import argparse
import gc
import json
import math
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from kdlm_kernels import OPTIONS, linear_divergence, plan_chunks
from kdlm_kernels.chunks import free_bytes
from machine import _version, described
from torch import Tensor

Inputs, Figure, Point = tuple[Tensor, ...], dict[str, float], dict[str, Any]
SHAPES = {
    "Qwen3-0.6B<-8B": {"student_width": 1024, "teacher_width": 4096, "vocab": 151_936},
    "Qwen3-1.7B<-32B": {"student_width": 2048, "teacher_width": 5120, "vocab": 151_936},
    "Llama-3.2-1B<-8B": {"student_width": 2048, "teacher_width": 4096, "vocab": 128_256},
}
ROWS = (1024, 8192, 32_768)
DIVERGENCES = tuple(name for name in OPTIONS if name != "cross_entropy")
BETA = {"forward_kl": 0.0, "generalised_jsd": 0.5, "reverse_kl": 1.0}
WARM_UP, REPEATS = 2, 5
GATES = {"time / floor": 1.15, "extra GiB": 1.0, "time / TRL or Liger": 1 / 1.5, "gradient error / torch": 1.05}
ERROR_SHAPE = {"rows": 512, "student_width": 1024, "teacher_width": 4096, "vocab": 32_768, "scale": 4.0}
COLUMNS = ("kdlm ms / GiB", "torch ms / GiB", "trl ms / GiB", "liger ms / GiB", "floor ms", "kdlm / floor")
RESULTS = Path(__file__).parent / "results" / "loss_gpu.json"


def draw(rows: int, student_width: int, teacher_width: int, vocab: int, scale=1.0, device="cuda") -> Inputs:
    """Return hidden states and head of the student, then the teacher's; logits have standard deviation `scale`."""
    torch.manual_seed(0)
    sizes = [(size, width) for width in (student_width, teacher_width) for size in (rows, vocab)]
    h_s, w_s, h_t, w_t = (torch.randn(size, dtype=torch.bfloat16, device=device) for size in sizes)
    w_s.mul_(scale / student_width**0.5)
    w_t.mul_(scale / teacher_width**0.5)
    return h_s.requires_grad_(), w_s.requires_grad_(), h_t, w_t


@torch.no_grad()
def floor(size: int, h_s: Tensor, w_s: Tensor, h_t: Tensor, w_t: Tensor) -> tuple[Tensor, Tensor]:
    """The four products over chunks of `size` rows, with the first one's result in the place of its gradient."""
    z, y = h_s.new_empty(size, len(w_s)), h_s.new_empty(size, len(w_t))
    to_hidden, to_head = torch.empty_like(h_s), torch.empty_like(w_s)
    for start in range(0, len(h_s), size):
        chunk = slice(start, start + size)
        hidden, logits = h_s[chunk], z[: len(h_s) - start]
        torch.mm(hidden, w_s.T, out=logits)
        torch.mm(h_t[chunk], w_t.T, out=y[: len(hidden)])
        torch.mm(logits, w_s, out=to_hidden[chunk])
        torch.addmm(to_head, logits.T, hidden, beta=int(start > 0), out=to_head)
    return to_hidden, to_head


def kdlm(name: str, h_s: Tensor, w_s: Tensor, h_t: Tensor, w_t: Tensor) -> Tensor:
    return linear_divergence(h_s, w_s, h_t, w_t, divergence=name, **({"t": 0.5} if name == "taid_kl" else {})).sum()


def plain(name: str, h_s: Tensor, w_s: Tensor, h_t: Tensor, w_t: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The formulas as one writes them in torch on whole logits; `dtype` is that of the softmax."""
    with torch.no_grad():
        y = (h_t @ w_t.T).to(dtype)
    z = (h_s @ w_s.T).to(dtype)
    q, p = z.log_softmax(-1), y.log_softmax(-1)

    def kl(of: Tensor, to: Tensor) -> Tensor:
        return F.kl_div(to, of, log_target=True, reduction="none").sum(-1)

    def mixture(a: Tensor, b: Tensor, share: float) -> Tensor:
        return torch.logaddexp(a + math.log(share), b + math.log1p(-share))

    formulas = {
        "forward_kl": lambda: kl(p, q),
        "reverse_kl": lambda: kl(q, p),
        "skew_kl": lambda: kl(p, mixture(p, q, 0.1)),
        "skew_reverse_kl": lambda: kl(q, mixture(q, p, 0.1)),
        "generalised_jsd": lambda: 0.5 * (kl(p, m := mixture(p, q, 0.5)) + kl(q, m)),
        "total_variation": lambda: (p.exp() - q.exp()).abs().sum(-1) / 2,
        "adaptive_kl": lambda: (w := in_head(p, q, 0.5)) * kl(p, q) + (1 - w) * kl(q, p),
        "alpha_mixture": lambda: kl(p, (2 * mixture(p / 2, q / 2, 0.1)).log_softmax(-1)),
        "taid_kl": lambda: kl(torch.lerp(z.detach(), y, 0.5).log_softmax(-1), q),
    }
    return formulas[name]().sum()


@torch.no_grad()
def in_head(p: Tensor, q: Tensor, mass: float) -> Tensor:
    """Return, for each row, the share of `sum |p - q|` on the teacher's most probable tokens, up to `mass`."""
    probs, gap = p.exp(), (p.exp() - q.exp()).abs_()
    top = probs.sort(-1, descending=True).values
    last = (top.cumsum(-1) <= mass).sum(-1, keepdim=True).sub_(1).clamp_(min=0)
    return (gap * (probs >= top.gather(-1, last))).sum(-1) / gap.sum(-1)


def trl(name: str, h_s: Tensor, w_s: Tensor, h_t: Tensor, w_t: Tensor) -> Tensor:
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    mask = torch.ones(1, len(h_s), dtype=torch.long, device=h_s.device)
    return _chunked_divergence_loss(h_s[None], h_t[None], w_s, w_t, mask, beta=BETA[name], num_items_in_batch=1)[0]


def liger(op: str, name: str, h_s: Tensor, w_s: Tensor, h_t: Tensor, w_t: Tensor) -> Tensor:
    """One of Liger's ops. chunked, jsd and logits return the mean over rows: a sum would cost them one more pass."""
    from liger_kernel import chunked_loss, transformers

    labels, beta = torch.zeros(len(h_s), dtype=torch.long, device=h_s.device), BETA.get(name, 0.5)
    if op == "chunked":
        loss = chunked_loss.LigerFusedLinearJSDLoss(0.0, 1.0, beta, compiled=h_s.is_cuda)
        return loss(h_s, w_s, h_t, w_t, labels)
    if op == "jsd":
        return transformers.LigerFusedLinearJSD(beta)(h_s, w_s, h_t, w_t, None)
    y = h_t @ w_t.T
    if op == "kl":
        return transformers.LigerFusedLinearKLDivLoss("sum")(h_s, w_s, y.softmax(-1))
    if op == "logits":
        return transformers.LigerJSD(beta)((h_s @ w_s.T).log_softmax(-1), y.log_softmax(-1))
    return transformers.LigerFusedCETVDLoss()(h_s @ w_s.T, y, labels)[1].sum()


LIGER = {"chunked": BETA, "jsd": BETA, "kl": ["forward_kl"], "logits": BETA, "tvd": ["total_variation"]}
WAYS: dict[str, tuple[Callable[..., Tensor], Collection[str]]] = {
    **{"kdlm": (kdlm, DIVERGENCES), "torch": (plain, DIVERGENCES), "trl": (trl, BETA)},
    **{f"liger {op}": (partial(liger, op), names) for op, names in LIGER.items()},
}


def measured(run: Callable[..., Tensor], bottom: Callable, inputs: Inputs) -> Figure:
    """Return the medians in milliseconds, of `run` and of the floor between its repeats, and extra memory in GiB."""
    h_s, w_s = inputs[:2]

    def once() -> None:
        h_s.grad = w_s.grad = None
        run(*inputs).backward()

    torch.compiler.reset()  # else compiled code for other shapes and betas counts towards the limit of recompilations
    for _ in range(WARM_UP):
        once()
        bottom(*inputs)
    h_s.grad = w_s.grad = None
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    once()
    extra = torch.cuda.max_memory_allocated() - before - h_s.grad.nbytes - w_s.grad.nbytes
    times = [(timed(once), timed(partial(bottom, *inputs))) for _ in range(REPEATS)]
    own, floor_ms = (median(column) for column in zip(*times, strict=True))
    return {"ms": own, "floor_ms": floor_ms, "extra_gib": extra / 2**30}


def timed(run: Callable[[], Any]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def figure(way: str, name: str, bottom: Callable, inputs: Inputs) -> Figure | str:
    """Measure a way; where that fails return why, so that the others are measured all the same."""
    try:
        return measured(partial(WAYS[way][0], name), bottom, inputs)
    except torch.OutOfMemoryError:
        return "out of memory"
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name in ("trl", "liger_kernel"):
            return "not installed"
        print(f"{way}, {name}: {error!r}", file=sys.stderr)
        return "failed"


def points(pair: str, rows: int, names: Collection[str]) -> Iterator[Point]:
    """Measure every way; a point names its shape, and has a figure, or why there is none, by way."""
    inputs = draw(rows, **SHAPES[pair])
    size = plan_chunks(rows, free=free_bytes(inputs[0].device), **SHAPES[pair]).rows
    for name in names:
        point: Point = {"point": f"{pair} x {rows}, {name}"}
        for way in (way for way, (_, having) in WAYS.items() if name in having):
            gc.collect()
            torch.cuda.empty_cache()
            point[way] = figure(way, name, partial(floor, size), inputs)
        yield point


def best(point: Point, *ways: str) -> Figure | str:
    """Return the fastest figure of the ways that begin so, or why there is none."""
    found = [point[way] for way in WAYS if way in point and way.split()[0] in ways]
    return min((x for x in found if isinstance(x, dict)), key=lambda x: x["ms"], default=found[0] if found else "-")


def line(point: Point) -> str:
    cells = ["not measured"] * len(COLUMNS)
    if "kdlm" in point:
        figures = [best(point, column.split()[0]) for column in COLUMNS[:4]]
        cells = [x if isinstance(x, str) else f"{x['ms']:.1f} / {x['extra_gib']:.2f}" for x in figures]
        if isinstance(own := figures[0], dict):
            cells += [f"{own['floor_ms']:.1f}", f"{own['ms'] / own['floor_ms']:.3f}"]
    return f"{point['point']:<46}" + "".join(f"{cell:>16}" for cell in cells)


def gradient_errors(name: str, inputs: Inputs) -> dict[str, list[float]]:
    """Return the relative errors of the gradients to hidden states and head, by way."""

    def gradients(run: Callable[..., Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
        fresh = [x.detach().to(dtype, copy=True).requires_grad_(x.requires_grad) for x in inputs]
        run(name, *fresh).backward()
        return [x.grad.double() for x in fresh[:2]]

    exact, found = gradients(plain, torch.float64), {}
    for way, run in (("kdlm", kdlm), ("torch", plain), ("torch, fp32 softmax", partial(plain, dtype=torch.float32))):
        found[way] = [float(torch.dist(x, y) / y.norm()) for x, y in zip(gradients(run), exact, strict=True)]
    return found


def judged(found: list[Point], errors: dict[str, dict[str, list[float]]]) -> dict[str, tuple[float, str]]:
    """Return the worst figure of every gate and where that was; a gate without figures is left out."""
    ratios: dict[str, list[tuple[float, str]]] = {gate: [] for gate in GATES}
    for point in found:
        own, peer = point["kdlm"], best(point, "trl", "liger")
        own = own if isinstance(own, dict) else {"ms": math.inf, "floor_ms": 1.0, "extra_gib": math.inf}
        ratios["time / floor"].append((own["ms"] / own["floor_ms"], point["point"]))
        ratios["extra GiB"].append((own["extra_gib"], point["point"]))
        if isinstance(peer, dict):
            ratios["time / TRL or Liger"].append((own["ms"] / peer["ms"], point["point"]))
    for name, by_way in errors.items():
        for which, own, *theirs in zip(("hidden states", "head"), *by_way.values(), strict=True):
            ratios["gradient error / torch"].append((own / min(theirs), f"{name}, {which}"))
    return {gate: max(all_) for gate, all_ in ratios.items() if all_}


def machine() -> dict[str, Any]:
    gpu = torch.cuda.get_device_properties(0)
    driver = subprocess.getoutput("nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null")
    own = {"gpu": gpu.name, "gpu_memory_gib": round(gpu.total_memory / 2**30), "driver": driver.split("\n")[0] or None}
    return described() | own | {"cuda": torch.version.cuda} | {x: _version(x) for x in ("triton", "liger-kernel")}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one pair, 1,024 and 8,192 rows, three divergences")
    parser.add_argument("--check", action="store_true", help="exit 1 where a bound is broken")
    options = parser.parse_args()
    names = list(BETA) if options.quick else DIVERGENCES
    shapes = list(product(SHAPES, ROWS))[: 2 if options.quick else None]
    print(f"{'pair x rows, divergence':<46}" + "".join(f"{column:>16}" for column in COLUMNS))
    if not torch.cuda.is_available():
        print("\n".join(line({"point": f"{pair} x {rows}, {name}"}) for (pair, rows), name in product(shapes, names)))
        print("gradient error: not measured. No CUDA GPU" + (": nothing was checked" if options.check else ""))
        print("python benchmarks/loss_gpu.py" + (" --quick" if options.quick else ""))
        return 0
    errors = {name: gradient_errors(name, draw(**ERROR_SHAPE)) for name in names}
    found: list[Point] = []
    for pair, rows in shapes:
        for point in points(pair, rows, names):
            found.append(point)
            print(line(point), flush=True)
        if not options.quick:  # after every shape: a run that is cut short leaves what it has
            results = {"machine": machine(), "shapes": SHAPES, "points": found, "gradient_errors": errors}
            RESULTS.write_text(json.dumps(results, indent=2) + "\n")
    for name, by_way in errors.items():
        print(f"gradient error, {name}: " + "; ".join(f"{way} {h:.2e} {w:.2e}" for way, (h, w) in by_way.items()))
    worst = judged(found, errors)
    for gate, bound in GATES.items():
        value, place = worst.get(gate, (0.0, ""))
        verdict = "not checked, nothing to compare with" if not place else "ok" if value <= bound else "MISSED"
        print(f"{gate} at most {bound:.3f}: {verdict}" + (f" ({value:.3f}: {place})" if place else ""))
    print("kdlm at worst: " + ", ".join(f"{gate} {value:.3f}" for gate, (value, _) in worst.items()))
    return int(options.check and any(value > GATES[gate] for gate, (value, _) in worst.items()))


if __name__ == "__main__":
    sys.exit(main())
