"""`kdlm plan`: memory by part, tokens/s and hours of a recipe before it runs, and what to change if it does not fit."""

import json

from kdlm.plan.advice import Advice, advise, changed, enough
from kdlm.plan.devices import Device, device
from kdlm.plan.prediction import PARTS, Prediction, predict
from kdlm.plan.report import advice_lines, lines
from kdlm.recipe import Recipe

__all__ = ["PARTS", "Advice", "Device", "Prediction", "advise", "changed", "device", "enough", "plan", "predict"]


def plan(recipe: Recipe, gpu: str | None = None, *, as_json: bool = False) -> int:
    """Print what a recipe will take of a device (None: this machine's) and return 0 where it fits, else 1."""
    found = predict(recipe, device(gpu))
    advice = [] if found.fits else advise(recipe, found)
    together, then = enough(recipe, found.device, advice)
    if as_json:
        told = [{"what": one.what, "overrides": one.overrides, "saves": one.saves} for one in advice]
        fitting = None if then is None else {"changes": together, "total": then.total}
        print(json.dumps(found.as_dict() | {"advice": told, "enough": fitting}, indent=2))
    else:
        print("\n".join(lines(found)))
        if not found.fits:
            print("\n".join(advice_lines(advice, together, then)))
    return 0 if found.fits else 1
