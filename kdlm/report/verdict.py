"""What a report says first: a sentence on the best run, of figures that were measured."""

from collections.abc import Sequence
from typing import Any

from kdlm.estimates import Estimate
from kdlm.report.groups import Group, comparable
from kdlm.report.metrics import plain


def verdict(groups: Sequence[Group]) -> str:
    """Return what was gained, against a student trained on the data alone where one is here, else against the start."""
    taught = [group for group in groups if not group.baseline and group.final("cross_entropy")]
    plain_ones = [group for group in groups if group.baseline and group.final("cross_entropy")]
    if len(groups) > 1 and not comparable(groups):
        return "The runs were evaluated on different data, so their figures are not set against each other."
    if taught and plain_ones and (against := _against(taught, plain_ones)):
        return against
    best = min(taught or plain_ones, key=lambda group: _value(group.final("cross_entropy")), default=None)
    if best is None:
        return _other(groups)
    theirs, ours = best.final("teacher_cross_entropy"), _value(best.final("cross_entropy"))
    if theirs is None:
        return f"{best.label} ends with a held-out loss of {plain(ours)} nats."
    start = best.runs[0].points("eval_cross_entropy")[:1]
    said = f"{best.label} ends with a held-out loss of {plain(ours)} nats; its teacher has {plain(theirs.value)}"
    if not start or start[0][0] != 0 or start[0][1] <= theirs.value:
        return f"{said}."
    share = (start[0][1] - ours) / (start[0][1] - theirs.value)
    return f"{said}, and it began at {plain(start[0][1])}: {percent(share)} of the way."


def baseline(groups: Sequence[Group]) -> Group | None:
    """Return the best group that learnt from the data alone, which the others are measured against."""
    found = [group for group in groups if group.baseline and group.final("cross_entropy")]
    return min(found, key=lambda group: _value(group.final("cross_entropy")), default=None)


def gap_to(group: Group, plain_one: Group) -> Estimate | None:
    """Return the share of the gap in held-out loss, from a student of the data alone to the teacher, that is closed.

    Seeds that both have are paired and their shares averaged; without any the means are compared. None where nothing
    is known of the teacher or the baseline is no worse than it.
    """
    from kdlm.estimates import mean

    theirs = {run.recipe.get("seed"): run.final.get("cross_entropy") for run in plain_one.runs}
    shares = []
    for run in group.runs:
        ours, goal = run.final.get("cross_entropy"), run.final.get("teacher_cross_entropy")
        start = theirs.get(run.recipe.get("seed"), _value(plain_one.final("cross_entropy")))
        if ours is None or goal is None or start is None or not start > goal:
            return None
        shares.append((start - ours) / (start - goal))
    return mean(shares)


def _against(taught: Sequence[Group], plain_ones: Sequence[Group]) -> str:
    plain_one = min(plain_ones, key=lambda group: _value(group.final("cross_entropy")))
    gains = [(gap.value, group, gap) for group in taught if (gap := gap_to(group, plain_one)) is not None]
    if not gains:
        return ""
    share, best, gap = max(gains, key=lambda gain: gain[0])
    start = _value(plain_one.final("cross_entropy"))
    goal = _value(best.final("teacher_cross_entropy"))
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
        finals: list[tuple[float, Group]] = [(_value(found), g) for g in groups if (found := g.final(name))]
        if finals:
            value, best = max(finals, key=lambda pair: pair[0])
            return f"{best.label} reaches {100 * value:.1f} % {name.replace('top1_', 'top-1 ')} on held-out data."
    return "What was measured is in the table below."


def percent(share: float) -> str:
    """Return a share in whole percent."""
    return f"{100 * share:.0f} %".replace("-", "−")  # noqa: RUF001


def _value(estimate: Estimate | None) -> Any:
    return None if estimate is None else estimate.value
