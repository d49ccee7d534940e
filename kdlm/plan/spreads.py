"""Every way to spread a recipe over many GPUs: each strategy with each place of the teacher."""

import json
from collections.abc import Iterator
from typing import Any

from kdlm.plan import cluster_report
from kdlm.plan.advice import changed
from kdlm.plan.cluster import Cluster, Spread
from kdlm.plan.devices import Device
from kdlm.plan.placement import planned, shardable
from kdlm.plan.prediction import Prediction, predict
from kdlm.plan.strategies import STRATEGIES, Strategy, strategy_of
from kdlm.recipe import Recipe

CACHED = 128
"""Tokens of which a captured teacher's log-probabilities are planned."""


def spreads(recipe: Recipe, where: Device, cluster: Cluster) -> list[Spread]:
    """Return every strategy with every place of the teacher; the teacher that a recipe has, where it has only one."""
    found = list(_places(recipe, where))
    return [Spread(alone, cluster, one, **place) for one in STRATEGIES.values() for alone, place in found]


def plan_cluster(recipe: Recipe, where: Device, cluster: Cluster, strategy: str | None, *, as_json: bool) -> int:
    """Print what each of many GPUs will take and send, and the table; return 0 where it fits, else 1.

    Args:
        strategy: of STRATEGIES, the one that is told in full; None: the recipe's.
    """
    every = spreads(recipe, where, cluster)
    own = _own(recipe, every, strategy_of(recipe) if strategy is None else STRATEGIES[strategy])
    if as_json:
        told = {"device": where.name, "gpus": cluster.gpus, "per_node": cluster.per_node}
        print(json.dumps(told | {"chosen": own.as_dict(), "spreads": [one.as_dict() for one in every]}, indent=2))
    else:
        print("\n".join([*cluster_report.lines(own), *cluster_report.table(every)]))
    return 0 if own.fits else 1


def _own(recipe: Recipe, every: list[Spread], strategy: Strategy) -> Spread:
    """Return what the recipe says; of `placement: auto` the first that fits, or else the last of its choice."""
    own = [one for one in every if one.strategy is strategy]
    named = getattr(recipe.teacher, "placement", None)
    if named == "auto":
        choice = [one for one in own if one.placement in ("resident", "sliced", "sharded")]
        return next((one for one in choice if one.fits), choice[-1])
    named = "next GPU" if getattr(recipe.teacher, "device", None) is not None else named
    return next((one for one in own if one.placement == named), own[0])


def _places(recipe: Recipe, where: Device) -> Iterator[tuple[Prediction, dict[str, Any]]]:
    """Yield what one process takes, and what its Spread is told, for each place."""
    places = {name: alone for name, _, alone in planned(recipe, where)}
    if not places:
        yield predict(recipe, where), {"placement": getattr(recipe.teacher, "name", None)}
        return
    resident, teacher = places["resident"], recipe.teacher
    assert teacher is not None  # or it would have no places
    for name, alone in places.items():
        place: dict[str, Any] = {"placement": name}
        if name == "next GPU" and resident.traced.teacher is not None:
            seconds = 0.0 if resident.seconds is None else resident.seconds.get("teacher forward", 0.0)
            place |= {"teacher": resident.traced.teacher.bytes, "waits": seconds}
        yield alone, place
        if name == "sliced" and shardable(recipe):
            yield resident, {"placement": "sharded"}
    if "served" in places:
        kept = {"name": "top_k", "k": CACHED, "tail_draws": 0}
        of = teacher.model_dump(mode="json", exclude_unset=True) | {"name": teacher.name}
        of = {key: value for key, value in of.items() if key not in ("placement", "offload", "batch_size", "device")}
        cached = {"name": "cached", "path": "captures/teacher", "of": of, "format": kept}
        yield predict(changed(recipe, {"teacher": cached}), where), {"placement": "cached"}
