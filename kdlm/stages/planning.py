"""`kdlm plan` of a file of stages: every stage, and the one that needs the most memory."""

import json
from typing import Any

from kdlm.plan import Prediction, advise, device, enough, predict
from kdlm.plan.report import advice_lines, lines, size
from kdlm.stages.looks import looks
from kdlm.stages.reading import StagedRun


def plan(run: StagedRun, gpu: str | None = None, *, as_json: bool = False) -> int:
    """Print what every stage that trains will take of a device (None: this machine's).

    Return 0 where all fit, else 1.

    Raises RecipeError for a stage that plan does not cover, or where none trains.
    """
    found: dict[str, Prediction] = {}
    told: dict[str, Any] = {}
    others: dict[str, str] = {}
    with looks(run, rows=False) as read:
        for look in read:
            stage, recipe = look.stage, look.recipe
            if look.why:
                raise stage.explained(ValueError(f"cannot be planned yet: {look.why}"))
            if recipe is None or not stage.trains:
                others[stage.name] = f"a {stage.kind.does}, not planned here: its models without what training takes"
                if not as_json:
                    print(f"stage {stage.name}: {others[stage.name]}")
                continue
            try:
                one = found[stage.name] = predict(recipe, device(gpu))
            except ValueError as error:
                raise stage.explained(ValueError(look.shown(str(error)))) from error
            if as_json:
                told[stage.name] = one.as_dict()
                continue
            print("\n".join([f"stage {stage.name}:", *(f"  {line}" for line in lines(one))]))
            if not one.fits:
                advice = advise(recipe, one)
                print("\n".join(f"  {line}" for line in advice_lines(advice, *enough(recipe, one.device, advice))))
    if not found:
        raise ValueError(f"stages: none of them trains: plan covers stages with a recipe, not {', '.join(others)}")
    most = max(found, key=lambda name: found[name].total)
    fits = all(one.fits for one in found.values())
    if as_json:
        print(json.dumps({"stages": told, "others": others, "most": most, "fits": fits}, indent=2))
    else:
        print(f"all stages: {size(found[most].total)} at most, in stage {most}: {'fits' if fits else 'does not fit'}")
    return 0 if fits else 1
