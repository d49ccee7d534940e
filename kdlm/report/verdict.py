"""What a report says first: a sentence on the best run, of figures that were measured."""

from collections.abc import Sequence
from typing import Any

from kdlm.estimates import Estimate, finite, mean
from kdlm.metrics import gap_closed
from kdlm.report.groups import Group, comparable
from kdlm.report.numbers import plain


def verdict(groups: Sequence[Group]) -> str:
    """Return what was gained, against a student trained on the data alone where one is here, else against the start."""
    taught = [group for group in groups if not group.baseline and _final(group) is not None]
    plain_ones = [group for group in groups if group.baseline and _final(group) is not None]
    if len(groups) > 1 and not comparable(groups):
        return "The runs were evaluated on different data, so their figures are not set against each other."
    if taught and plain_ones and (against := _against(taught, plain_ones)):
        return against
    best = min(taught or plain_ones, key=_final, default=None)
    if best is None:
        return _other(groups)
    theirs, ours = _final(best, "teacher_cross_entropy"), _final(best)
    if theirs is None:
        return f"{best.label} ends with a held-out loss of {plain(ours)} nats."
    said = f"{best.label} ends with a held-out loss of {plain(ours)} nats; its teacher has {plain(theirs)}"
    first = next(iter(best.runs[0].points("eval_cross_entropy")), (1, 0.0))
    share = finite(gap_closed(first[1], ours, theirs))
    if first[0] != 0 or share is None:
        return f"{said}."
    return f"{said}, and it began at {plain(first[1])}: {percent(share)} of the way."


def baseline(groups: Sequence[Group]) -> Group | None:
    """Return the best group that learnt from the data alone, which the others are measured against."""
    return min((group for group in groups if group.baseline and _final(group) is not None), key=_final, default=None)


def gap_to(group: Group, plain_one: Group) -> Estimate | None:
    """Return the share of the gap in held-out loss, from a student of the data alone to the teacher, that is closed.

    Seeds that both have are paired and their shares averaged; without any the means are compared. None where nothing
    is known of the teacher or the baseline is no worse than it.
    """
    theirs = {run.recipe.get("seed"): run.final.get("cross_entropy") for run in plain_one.runs}
    shares = []
    for run in group.runs:
        ours, goal = run.final.get("cross_entropy"), run.final.get("teacher_cross_entropy")
        start = theirs.get(run.recipe.get("seed"), _final(plain_one))
        if ours is None or goal is None or start is None:
            return None
        shares.append(gap_closed(start, ours, goal))
    found = mean(shares)
    return None if finite(found.value) is None else found


def _against(taught: Sequence[Group], plain_ones: Sequence[Group]) -> str:
    plain_one = min(plain_ones, key=_final)
    gains = [(gap.value, group, gap) for group in taught if (gap := gap_to(group, plain_one)) is not None]
    if not gains:
        return ""
    share, best, gap = max(gains, key=lambda gain: gain[0])
    start, goal = _final(plain_one), _final(best, "teacher_cross_entropy")
    between = f"the gap in held-out loss between {plain_one.label} ({plain(start)}) and the teacher ({plain(goal)})"
    if share <= 0:
        none = "No distilled student beats the one trained on the data alone"
        return f"{none}: {best.label} closes {percent(share)} of {between}."
    low, high = gap.interval()
    spread = (
        f" (95 % interval over {len(best.runs)} seeds: {percent(low)} to {percent(high)})" if gap.freedom > 0 else ""
    )
    seeds = "" if gap.freedom > 0 else " One seed: no interval."
    return f"{best.label} closes {percent(share)}{spread} of {between}.{seeds}"


def _other(groups: Sequence[Group]) -> str:
    """Return what is known of runs that have no loss on text."""
    unfinished = [run.name for group in groups for run in group.runs if not run.final]
    if len(unfinished) == sum(len(group.runs) for group in groups):
        return "Nothing was evaluated yet, or the recipe has no held-out data."
    for name in ("accuracy", "top1_agreement"):
        if finals := [(value, group) for group in groups if (value := _final(group, name)) is not None]:
            value, best = max(finals, key=lambda pair: pair[0])
            return f"{best.label} reaches {100 * value:.1f} % {name.replace('top1_', 'top-1 ')} on held-out data."
    return "What was measured is in the table below."


def percent(share: float) -> str:
    """Return a share in whole percent."""
    return f"{100 * share:.0f} %".replace("-", "−")  # noqa: RUF001


def _final(group: Group, name: str = "cross_entropy") -> Any:
    """Return a held-out figure of a group, None where one of its runs has none, or has diverged."""
    found = group.final(name)
    return None if found is None else finite(found.value)
