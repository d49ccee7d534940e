"""`kdlm plan`: memory by part, tokens/s and hours of a recipe before it runs, and what to change if it does not fit."""

import json

from kdlm.plan.advice import Advice, advise, changed, enough
from kdlm.plan.cluster import Cluster, Spread
from kdlm.plan.communication import sent
from kdlm.plan.devices import Device, device
from kdlm.plan.placement import Placement, as_chosen, placements, settled, table
from kdlm.plan.prediction import PARTS, Prediction, predict
from kdlm.plan.ranks import per_rank
from kdlm.plan.report import advice_lines, lines
from kdlm.plan.spreads import plan_cluster, spreads
from kdlm.plan.strategies import STRATEGIES, Strategy, strategy_of
from kdlm.recipe import Recipe

__all__ = [
    "PARTS",
    "STRATEGIES",
    "Advice",
    "Cluster",
    "Device",
    "Placement",
    "Prediction",
    "Spread",
    "Strategy",
    "advise",
    "changed",
    "device",
    "enough",
    "per_rank",
    "placements",
    "plan",
    "predict",
    "sent",
    "settled",
    "spreads",
    "strategy_of",
]


def plan(
    recipe: Recipe,
    gpu: str | None = None,
    *,
    cluster: Cluster | None = None,
    strategy: str | None = None,
    as_json: bool = False,
) -> int:
    """Print what a recipe will take of a device (None: this machine's) and return 0 where it fits, else 1.

    Where the recipe says `placement: auto`, that is of the first placement that fits, or else of the last.

    Args:
        cluster: many such devices, each of which takes its share.
        strategy: how they share, of STRATEGIES; None: as the recipe says.
    """
    where = device(gpu)
    if cluster is not None:
        return plan_cluster(recipe, where, cluster, strategy, as_json=as_json)
    places = list(placements(recipe, where))
    recipe = as_chosen(recipe, places)
    found = predict(recipe, where)
    advice = [] if found.fits else advise(recipe, found)
    together, then = enough(recipe, found.device, advice)
    if as_json:
        told = [{"what": one.what, "overrides": one.overrides, "saves": one.saves} for one in advice]
        fitting = None if then is None else {"changes": together, "total": then.total}
        said = {one.name: one.as_dict() for one in places}
        print(json.dumps(found.as_dict() | {"advice": told, "enough": fitting, "placements": said}, indent=2))
    else:
        print("\n".join([*lines(found), *table(places)]))
        if not found.fits:
            print("\n".join(advice_lines(advice, together, then)))
    return 0 if found.fits else 1
