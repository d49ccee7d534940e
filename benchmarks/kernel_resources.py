"""Registers and spills of every fused kernel, compiled ahead of time: needs no GPU.

    python benchmarks/kernel_resources.py [--quick] [--check]

Each kernel is compiled as `linear_divergence` would launch it for every formula, for sm_80, sm_90 and sm_100 (--quick:
sm_90 only), and its resources are read from the cubin. --check exits 1 where one does not compile or a thread
spills more than 16 bytes.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import triton
import triton.language as tl
from kdlm_kernels import triton_kernels, triton_rows
from kdlm_kernels.terms import MEASURED, OPTIONS, Term
from machine import described
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ARCHITECTURES = (80, 90, 100)
SPILL_GATE = 16
POINTERS = {"label_pointer": "*i64", "grad_pointer": "*bf16"}
RESULTS = Path(__file__).parent / "results" / "kernel_resources.json"


def plans() -> dict[str, tuple]:
    """Every term by itself, every measure, and a mixture of three with cross-entropy over a longer vocabulary."""
    needed = {"taid_kl": {"t": 0.5}}
    terms = {name: (Term(name, options=needed.get(name, {})).formula,) for name in OPTIONS}
    terms["alpha_mixture_geometric"] = (Term("alpha_mixture", options={"alpha": 1.0}).formula,)
    terms |= {name: (formula,) for name, formula in MEASURED.items()}
    mixed = ("forward_kl", "reverse_kl", "cross_entropy")
    return terms | {"+".join(mixed): tuple(Term(name, 0.5).formula for name in mixed)}


def launches(name: str, formulas: tuple, softcap: bool) -> Iterator[tuple[str, triton.JITFunction, dict]]:
    """Yield the kernels of a plan with their constants, as `triton_rows` launches them."""
    layout = triton_rows._layout(formulas, whole="+" not in name)
    shape = {"Z_SOFTCAP": softcap, "Y_SOFTCAP": softcap, "DTYPE": tl.float32, "BLOCK": triton_rows.BLOCK}
    teacher = {"HAS_TEACHER": True}
    for which in (slice(0, layout.first), slice(layout.first, None)):
        if sources := layout.sources[which]:
            owners = layout.owners[which]
            columns = {
                "OF_STUDENT": tuple(layout.of_student[owner] for owner in owners),
                "OF_TEACHER": tuple(layout.of_teacher[owner] for owner in owners),
            }
            constants = {"SOURCES": sources, "OWNERS": owners, "FORMULAS": len(formulas)} | columns | teacher | shape
            yield "logsumexp", triton_kernels.logsumexp_kernel, constants
    constants = {
        "KINDS": tuple(int(formula.kind) for formula in formulas),
        "GRADED": tuple(formula.graded for formula in formulas),
        "OF_STUDENT": layout.of_student,
        "OF_TEACHER": layout.of_teacher,
        "OF_THIRD": layout.of_third,
    }
    graded = any(formula.graded for formula in formulas)
    local = graded and all(formula.kind in triton_rows._LOCAL for formula in formulas)
    flags = [("sums and gradient", True, True)] if local else [("sums", True, False)]
    if graded and not local:
        flags.append(("gradient", False, True))
    for what, sums, grad in flags:
        yield what, triton_kernels.terms_kernel, constants | {"WITH_SUMS": sums, "WITH_GRAD": grad} | teacher | shape


def compiled(kernel: triton.JITFunction, constants: dict, architecture: int) -> tuple[int, int]:
    """Compile, and return the registers of a thread and the bytes that it spills."""
    signature = {
        name: POINTERS.get(name, "*fp32") if name.endswith("_pointer") else "i32"
        for name in kernel.arg_names
        if name not in constants
    }
    aligned = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in signature if name != "shared"}
    source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
    target = GPUTarget("cuda", architecture, 32)
    cubin = triton.compile(source, target=target, options={"num_warps": triton_rows.WARPS}).asm["cubin"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        usage = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    found = dict(re.findall(r"(REG|STACK):(\d+)", usage.stdout))
    return int(found["REG"]), int(found["STACK"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="sm_90 only")
    parser.add_argument("--check", action="store_true", help="exit 1 where a kernel spills more than 16 bytes")
    options = parser.parse_args()
    architectures = (90,) if options.quick else ARCHITECTURES
    print(f"{'formula':<40}{'kernel':<20}" + "".join(f"{f'sm_{a} regs/spill B':>20}" for a in architectures))
    points = []
    for name, formulas in plans().items():
        for softcap in (False, True) if name in ("forward_kl", "generalised_jsd") else (False,):
            for what, kernel, constants in launches(name, formulas, softcap):
                found = {a: compiled(kernel, constants, a) for a in architectures}
                title = f"{name}{', softcap' if softcap else ''}"
                print(f"{title:<40}{what:<20}" + "".join(f"{f'{r}/{s}':>20}" for r, s in found.values()), flush=True)
                points.append({"formula": title, "kernel": what, "registers_and_spilled_bytes": found})
    if not options.quick:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps({"machine": described(), "points": points}, indent=2) + "\n")
    every = [found for point in points for found in point["registers_and_spilled_bytes"].values()]
    most, spilled = (max(figures) for figures in zip(*every, strict=True))
    compiled_for = f"{len(points)} kernels, {len(architectures)} architectures"
    print(f"{compiled_for}: {most} registers and {spilled} spilled bytes at most")
    return int(options.check and spilled > SPILL_GATE)


if __name__ == "__main__":
    sys.exit(main())
