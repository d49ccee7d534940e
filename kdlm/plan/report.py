"""What `kdlm plan` prints."""

from collections.abc import Iterator

from kdlm.plan.advice import Advice, overrides
from kdlm.plan.devices import CONTEXT, FRAGMENTATION, GIB, HOST_LINK, LAUNCH, OF_BANDWIDTH, OF_PEAK
from kdlm.plan.prediction import PARTS, Prediction


def lines(found: Prediction) -> Iterator[str]:
    """Yield memory by part, the peak of every phase, and the pace."""
    settings, device = found.settings, found.device
    shape = f"{settings.batch} sequences of {settings.length} tokens"
    if settings.accumulation > 1:
        shape += f", {settings.accumulation} times an optimiser step"
    yield f"{device.name}, {size(device.memory)}; {shape}, every sequence at its longest"
    yield f"peak of memory, {'at the' if found.peak != 'backward' else 'in the'} {found.peak}:"
    for part in PARTS:
        if found.parts[part]:
            yield f"  {part:<20}{size(found.parts[part]):>12}"
    yield f"  {'total':<20}{size(found.total):>12}  {'fits' if found.fits else 'does not fit'}"
    yield "tensors at the peak of each phase: " + ", ".join(
        f"{name} {size(sum(parts.values()))}" for name, parts in found.phases.items() if name != "start"
    )
    if found.host:
        yield f"the teacher rests in the host's memory: {size(found.host)}, which go to the device in every step"
    yield from _pace(found)


def _pace(found: Prediction) -> Iterator[str]:
    device, seconds, pace = found.device, found.step_seconds, found.tokens_per_second
    if seconds is None or pace is None or found.seconds is None:
        yield "time: the device's rates are not known; give them: --gpu '24 GiB, 165 TFLOP/s, 1008 GB/s'"
        return
    parts = ", ".join(f"{name} {share / seconds:.0%}" for name, share in found.seconds.items())
    yield f"time: {pace:,.0f} tokens/s, {seconds:.3g} s an optimiser step ({parts})"
    if found.hours is None:
        per = 1e6 / pace / 3600
        yield f"{per:.2g} hours for each million tokens (training.max_steps would say how many there are)"
    else:
        yield f"{found.hours:.3g} hours for {found.settings.steps} steps, without evaluation"
    if device.measured:
        yield "measured here: the processor's rates and the framework's memory; the rest is calculated"
    else:
        yield (
            f"assumed, not measured: {OF_PEAK:.0%} of the peak rate and {OF_BANDWIDTH:.0%} of the bandwidth, "
            f"{LAUNCH * 1e6:.0f} µs to start an operation, {size(CONTEXT)} for CUDA, {FRAGMENTATION:.0%} of "
            f"fragmentation, {HOST_LINK / 1e9:.0f} GB/s from the host's memory"
        )


def advice_lines(advice: list[Advice], together: dict, then: Prediction | None) -> Iterator[str]:
    """Yield what to change, and which changes together are enough."""
    yield "what saves memory, each taken alone:" if advice else "no change that plan knows saves memory"
    for one in advice:
        yield f"  {size(one.saves):>10}  {one.what}: {one.overrides}"
    if then is not None:
        yield f"enough: {overrides(together)}"
        yield f"  {size(then.total)} in all" + (f", {then.hours:.3g} hours" if then.hours is not None else "")
    elif advice:
        yield "all of them together are not enough: take a smaller student or teacher, or a larger device"


def size(number: float) -> str:
    """Return bytes as one reads them."""
    return f"{number / GIB:.2f} GiB" if number >= GIB / 10 else f"{number / 2**20:.1f} MiB"
