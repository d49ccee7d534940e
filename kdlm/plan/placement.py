"""Where the teacher can be, what each place takes of the device, and which one `placement: auto` comes to."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from kdlm.plan.advice import advise, changed, enough, overrides
from kdlm.plan.devices import Device, device, host_memory
from kdlm.plan.prediction import Prediction, predict
from kdlm.plan.ranks import per_rank
from kdlm.plan.report import size
from kdlm.plan.strategies import strategy_of
from kdlm.recipe import Recipe
from kdlm.teachers import LocalTeacherSection, SandboxTeacherSection

CHOSEN = ("resident", "sliced", "sharded")
"""What `placement: auto` chooses from; in shards only where ranks share nothing less."""
ELSEWHERE = ("next GPU", "served")
"""Where a teacher's own time is not that of the student's device."""


@dataclass(frozen=True)
class Placement:
    """A place for the teacher.

    Attributes:
        name: of the table.
        changes: keys of the recipe that put the teacher there.
        found: what is foreseen of the student's device.
        moves: what moves in an optimiser step, in words.
        host: bytes of the host's memory that the ranks of this machine need for it together.
        host_memory: bytes that there are.
        pace: tokens/s, None where the teacher's own is not known.
    """

    name: str
    changes: Mapping[str, Any]
    found: Prediction
    moves: str
    host: int
    host_memory: int
    pace: float | None = None

    @property
    def fits(self) -> bool:
        return self.found.fits and self.host <= self.host_memory

    def as_dict(self) -> dict[str, Any]:
        """Return the figures, in bytes."""
        figures = {"device": self.found.total, "teacher": self.found.parts["teacher weights"], "host": self.host}
        return figures | {"fits": self.fits, "tokens_per_second": self.pace}


def placements(recipe: Recipe, where: Device) -> Iterator[Placement]:
    """Yield the places of a teacher that is a model of this machine, each planned; none of any other teacher.

    Of several ranks (WORLD_SIZE), a place is what each of them takes, and shards are a place too. On a CPU there is one
    memory, and so no other place in it.
    """
    here, ranks = world()
    strategy, shards = strategy_of(recipe), None
    for name, changes, alone in planned(recipe, where):
        found = per_rank(alone, ranks, strategy)
        if name == "resident" and ranks > 1 and shardable(recipe):
            of_a_rank = per_rank(alone, ranks, strategy, sharded_teacher=True)
            moves, sharded = "the teacher's layers, from rank to rank", changes | {"teacher.placement": "sharded"}
            shards = Placement("sharded", sharded, of_a_rank, moves, 0, host_memory())
        if name in ELSEWHERE:
            yield Placement(name, changes, found, "hidden states of the kept tokens", 0, host_memory())
            continue
        moves = f"the teacher's {size(found.host)} to the device" if found.host else "nothing"
        yield Placement(name, changes, found, moves, found.host * here, host_memory(), found.tokens_per_second)
    if shards is not None:
        yield shards


def world() -> tuple[int, int]:
    """Return how many ranks there are on this machine, and in all."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")), int(os.environ.get("WORLD_SIZE", "1"))


def planned(recipe: Recipe, where: Device) -> Iterator[tuple[str, dict[str, Any], Prediction]]:
    """Yield a name, changes of the recipe and what one process takes with them, for each place that is no sharing."""
    teacher = recipe.teacher
    if not isinstance(teacher, LocalTeacherSection | SandboxTeacherSection):
        return
    resident = {"teacher.placement": "resident", "teacher.device": None, "teacher.offload": False}
    places: list[tuple[str, dict[str, Any]]] = [("resident", resident)]
    if where.apart and teacher.quantization == "none":
        places.append(("sliced", resident | {"teacher.placement": "sliced"}))
    if "teacher.layers" not in recipe.method.build(recipe.losses, None).needs:  # which only a model at hand gives
        if where.apart:
            places.append(("next GPU", resident | {"teacher.device": "next"}))
        given = teacher.model_dump(include={"path", "model", "revision", "dtype"})
        of = {"name": "pretrained" if "path" in given else "sandbox", **given}
        places.append(("served", {"teacher": {"name": "served", "url": "http://127.0.0.1:8100", "of": of}}))
    for name, changes in places:
        yield name, changes, predict(changed(recipe, changes), where)


def shardable(recipe: Recipe) -> bool:
    """Whether a recipe's teacher can be sharded among ranks."""
    drawn_by_it = recipe.rollouts is not None and recipe.rollouts.sampling.teacher_share > 0
    return getattr(recipe.teacher, "quantization", None) == "none" and not drawn_by_it


def table(places: list[Placement]) -> Iterator[str]:
    """Yield a line for each place: the peak of the student's device, and the teacher's part of it."""
    if not places:
        return
    yield "the teacher's placement, each planned with the rest as it is; memory of the student's device:"
    yield f"  {'':<10}{'total':>12}{'teacher':>12}{'tokens/s':>10}  {'':<14}moves in a step"
    for one in places:
        fits = "fits" if one.fits else "does not fit"
        host = f", {size(one.host)} rest in the host's memory" if one.host else ""
        columns = f"{size(one.found.total):>12}{size(one.found.parts['teacher weights']):>12}"
        pace = "?" if one.pace is None else f"{one.pace:,.0f}"
        yield f"  {one.name:<10}{columns}{pace:>10}  {fits:<14}{one.moves}{host}"


def as_chosen(recipe: Recipe, places: list[Placement]) -> Recipe:
    """Return a recipe whose `auto` is the first placement that fits, or else the last; as it is without `auto`."""
    if getattr(recipe.teacher, "placement", None) != "auto" or not places:
        return recipe
    of_it = [one for one in places if one.name in CHOSEN]
    return changed(recipe, next((one for one in of_it if one.fits), of_it[-1]).changes)


def settled(recipe: Recipe) -> tuple[Recipe, dict[str, Any] | None]:
    """Return a recipe in which `teacher.placement: auto` is a placement, and the figures that led to it.

    As it is, without figures, where it does not say `auto`. The ranks of a run agree on what the first one foresees.

    Raises ValueError where nothing fits, with what would, and where the run cannot be planned.
    """
    if getattr(recipe.teacher, "placement", None) != "auto":
        return recipe, None
    where = device("cpu" if recipe.training.model_dump().get("use_cpu") else None)
    try:
        places = [one for one in placements(recipe, where) if one.name in CHOSEN]
    except ValueError as error:
        raise ValueError(f"teacher.placement: auto needs a plan ({error}): say {' or '.join(CHOSEN)}") from error
    if not places:
        raise ValueError(f"teacher.placement: auto is for text models: say {' or '.join(CHOSEN)}")
    chosen = _agreed(recipe, next((one.name for one in places if one.fits), None))
    if chosen is None:
        raise ValueError(_nothing_fits(recipe, places))
    if int(os.environ.get("RANK", "0")) == 0:
        print("\n".join([f"teacher.placement: auto: {chosen}, on {where.name}, {size(where.memory)}", *table(places)]))
    facts = {"placement": chosen, "device": where.name, "memory": where.memory}
    facts |= {"foreseen": {one.name: one.as_dict() for one in places}}
    return changed(recipe, {"teacher.placement": chosen}), facts


def _agreed(recipe: Recipe, name: str | None) -> str | None:
    """Return what the first rank has chosen: each measures its own process, and may be on the other side of a limit."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return name
    from accelerate.utils import broadcast_object_list

    _ = recipe.training.build(output_dir=str(recipe.run_dir)).device  # joins the ranks
    return broadcast_object_list([name])[0]


def _nothing_fits(recipe: Recipe, places: list[Placement]) -> str:
    now = places[-1]
    there = changed(recipe, now.changes)
    advice = advise(there, predict(there, now.found.device))  # of one process, as all changes are planned
    together, then = enough(there, now.found.device, advice)
    lines = [f"teacher.placement: auto: nothing fits into {size(now.found.device.memory)}", *table(places)]
    lines += [f"  saves {size(one.saves)}: {one.what}: {one.overrides}" for one in advice]
    fits = {**now.changes, **together} if then is not None else {}
    lines += [f"this would fit: {overrides(fits)}"] if fits else ["or a teacher that is served (kdlm serve)"]
    return "\n".join(lines)
