"""What `kdlm plan --gpus` prints: what one GPU takes, what it sends, the pace, and every way to spread the run."""

from collections.abc import Iterator

from kdlm.plan.cluster import COMES_BY, LINKS, OF_LINK, Spread
from kdlm.plan.devices import FRAGMENTATION, OF_BANDWIDTH, OF_PEAK
from kdlm.plan.prediction import PARTS
from kdlm.plan.report import size


def lines(spread: Spread) -> Iterator[str]:
    """Yield memory by part of a GPU, its bytes by what they are for, and the pace of all."""
    cluster, rank = spread.cluster, spread.rank
    settings = rank.settings
    yield (
        f"{cluster.gpus} x {rank.device.name}, {size(rank.device.memory)} each, on {cluster.nodes} machine(s); "
        f"{settings.batch} sequences of {settings.length} tokens on each, {settings.accumulation} times a step"
    )
    teacher = f", teacher {spread.placement}" if spread.placement else ""
    yield f"{spread.strategy.name}{teacher}; peak of a GPU's memory, {rank.peak}:"
    for part in PARTS:
        if rank.parts[part]:
            yield f"  {part:<20}{size(rank.parts[part]):>12}"
    yield f"  {'total':<20}{size(rank.total):>12}  {'fits' if rank.fits else 'does not fit'}"
    yield "a GPU's bytes in an optimiser step, and for each token that it trains on:"
    for what, amount in spread.sent.items():
        yield _amount(f"{what}, by {cluster.link}", amount, spread)
    if spread.placement in COMES_BY:
        yield _amount(f"of the teacher, by {COMES_BY[spread.placement]}", spread.brought, spread)
    yield from _pace(spread)


def _amount(what: str, amount: float, spread: Spread) -> str:
    return f"  {what:<32}{size(amount):>12}{amount / spread.alone.tokens:>14,.0f} bytes/token"


def _pace(spread: Spread) -> Iterator[str]:
    pace, alone = spread.tokens_per_second, spread.alone
    own, both = spread.utilisation(teacher=False), spread.utilisation(teacher=True)
    if pace is None or own is None or both is None:
        yield "time: the device's rates are not known; give them: --gpu '24 GiB, 165 TFLOP/s, 1008 GB/s'"
        return
    yield (
        f"time: {pace[0]:,.0f} tokens/s where nothing is sent beside computing, {pace[1]:,.0f} where all is; "
        f"computing {alone.step_seconds:.3g} s a step, links {spread.talking:.3g} s"
    )
    yield (
        f"MFU {own[0]:.0%} to {own[1]:.0%}: the student's forward and backward pass over the peak; {both[0]:.0%} to "
        f"{both[1]:.0%} with the teacher's forward pass"
    )
    rates = ", ".join(f"{name} {rate / 1e9:.0f}" for name, rate in LINKS.items())
    yield (
        f"assumed, not measured: {OF_PEAK:.0%} of the peak rate, {OF_BANDWIDTH:.0%} of the bandwidth, "
        f"{FRAGMENTATION:.0%} of fragmentation, {OF_LINK:.0%} of the links, in GB/s of a GPU: {rates}"
    )


def table(spreads: list[Spread]) -> Iterator[str]:
    """Yield a line for each way to spread the run."""
    yield "each strategy with each place of the teacher, the rest as it is:"
    yield f"  {'':<8}{'teacher':<12}{'memory':>12}  {'':<14}{'bytes/token':>14}{'tokens/s':>22}{'MFU':>14}"
    for one in spreads:
        fits = "fits" if one.fits else "does not fit"
        pace, own = one.tokens_per_second, one.utilisation(teacher=False)
        told = "?" if pace is None else f"{pace[0]:,.0f} to {pace[1]:,.0f}"
        share = "?" if own is None else f"{own[0]:.0%} to {own[1]:.0%}"
        yield (
            f"  {one.strategy.name:<8}{one.placement or '-':<12}{size(one.rank.total):>12}  {fits:<14}"
            f"{one.bytes_per_token:>14,.0f}{told:>22}{share:>14}"
        )
