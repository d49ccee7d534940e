"""Devices that a run is planned for: this machine's, one of a table, or one described in words."""

import os
import re
import time
from dataclasses import dataclass

import torch

GIB = 2**30
CONTEXT = 0.5 * GIB
"""Bytes that CUDA, its libraries and their workspaces take of a GPU. Assumed, not measured."""
FRAGMENTATION = 0.06
"""What torch's allocator holds on a GPU beyond the tensors, as a share of them. Assumed, not measured."""
OF_PEAK, OF_BANDWIDTH = 0.6, 0.8
"""Shares of a GPU's peak that products and passes over memory reach. Assumed, not measured."""
HOST_LINK = 20e9
"""Bytes/s from pinned memory of the host to a GPU. Assumed, not measured."""
LAUNCH = 6e-6
"""Seconds that Python and CUDA take to start an operation. Assumed, not measured."""


@dataclass(frozen=True)
class Device:
    """What memory and time are reckoned with.

    Attributes:
        memory: bytes.
        half, single: FLOP/s of products in bfloat16 (float16 where there is none) and in float32; None: not known.
        bandwidth: bytes/s of its memory.
        kind: `cuda` or `cpu`.
        bf16: whether it computes in bfloat16.
        measured: whether the rates were measured on it, or are its maker's.
        apart: whether its memory is another than the host's.
    """

    name: str
    memory: int
    half: float | None = None
    single: float | None = None
    bandwidth: float | None = None
    kind: str = "cuda"
    bf16: bool = True
    measured: bool = False
    apart: bool = True


# Memory: GiB that CUDA gives out, as PyTorch's messages of "total capacity" tell it in public issues; error correction
# takes a part of that of L4, L40S and T4. Rates: TFLOP/s dense with fp32 accumulation, in half and in single precision
# without TF32; GB/s; cards on SXM where there are several. Data sheets since Ada and Hopper print twice that for half
# precision, "with sparsity". Compared with reprints of NVIDIA's data sheets (H100: archive-lib.hpctech.co.jp, L40S:
# mullet.se), glennklockwood.com (A100, H100, B200) and hmc-tech.com (B200, RTX 4090, V100, T4, L4), not with NVIDIA's
# own. B200: sources say 75 or 80 TFLOP/s of fp32 and 7.7 or 8 TB/s; the smaller are taken. RTX 3090: not confirmed.
_TABLE: dict[str, tuple[float, float, float, float]] = {
    "A100 40GB": (39.5, 312, 19.5, 1555),
    "A100": (79.2, 312, 19.5, 2039),
    "H100": (79.1, 989.4, 66.9, 3350),
    "H200": (139.8, 989.4, 66.9, 4800),
    "B200": (178.3, 2250, 75, 7700),
    "L4": (22.0, 121, 30.3, 300),
    "L40S": (44.4, 362, 91.6, 864),
    "RTX 3090": (23.7, 71, 35.6, 936),
    "RTX 4090": (23.6, 165.2, 82.6, 1008),
    "RTX 5090": (31.4, 209.5, 104.8, 1792),
    "V100": (31.7, 125, 15.7, 900),
    "T4": (14.7, 65, 8.1, 320),
}
_WITHOUT_BF16 = frozenset({"V100", "T4"})
GPUS = {
    name: Device(name, int(memory * GIB), half * 1e12, single * 1e12, rate * 1e9, bf16=name not in _WITHOUT_BF16)
    for name, (memory, half, single, rate) in _TABLE.items()
}


def device(given: str | None) -> Device:
    """Return the device of a name, of a description, or, for None, the one that a run on this machine would take.

    Raises ValueError for a name that is not in the table.
    """
    if given is None:
        return _own_gpu() if torch.cuda.is_available() else cpu()
    if given.strip().lower() == "cpu":
        return cpu()
    if (known := _known(given)) is not None:
        return known
    found = {
        unit.lower(): float(number) for number, unit in re.findall(r"([\d.]+)\s*(GiB|GB/s|GB|TFLOP/s)", given, re.I)
    }
    memory = found.get("gib", found.get("gb"))
    if memory is None:
        raise ValueError(
            f"--gpu {given}: not known. One of {', '.join(GPUS)}, cpu, or its figures: "
            "'24 GiB', '24 GiB, 165 TFLOP/s, 1008 GB/s'"
        )
    half, rate = found.get("tflop/s"), found.get("gb/s")
    half, rate = None if half is None else half * 1e12, None if rate is None else rate * 1e9
    return Device(given, int(memory * GIB), half, None if half is None else half / 8, rate)


def _known(name: str) -> Device | None:
    """Return the GPU of the table that a name, such as CUDA gives it, speaks of."""
    words = re.sub(r"nvidia|geforce|tesla|rtx|sxm\d?|pcie|hbm\d?e?|80gb|\W", "", name.lower())
    for gpu in GPUS.values():
        if re.sub(r"rtx|\W", "", gpu.name.lower()) == words:
            return gpu
    return None


def _own_gpu() -> Device:
    own = torch.cuda.get_device_properties(0)
    known = _known(own.name)
    bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    rates = (None, None, None) if known is None else (known.half, known.single, known.bandwidth)
    return Device(own.name, own.total_memory, *rates, bf16=bf16)


def cpu() -> Device:
    """Return this machine's processor, its rates measured in about half a second, on as many threads as torch takes."""
    a, b = torch.ones(1024, 1024), torch.ones(1024, 1024)
    out = torch.empty(1024, 1024)
    flops = 2 * 1024**3 / _fastest(lambda: torch.mm(a, b, out=out))
    large = torch.ones(1 << 23)
    bandwidth = 2 * large.nbytes / _fastest(lambda: large.mul_(1.0))
    name = f"this machine's CPU ({torch.get_num_threads()} threads)"
    return Device(name, host_memory(), flops, flops, bandwidth, kind="cpu", bf16=False, measured=True, apart=False)


def host_memory() -> int:
    """Return the bytes of memory that this machine has, without its GPUs'."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _fastest(run, repeats: int = 5) -> float:
    best = float("inf")
    for _ in range(repeats + 1):
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return best


def resident() -> int:
    """Return the bytes of this process that are in memory; 0 where the system does not say."""
    try:
        with open("/proc/self/status", encoding="ascii") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmRSS:"))
    except (OSError, StopIteration):
        return 0
