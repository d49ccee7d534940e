"""What `kdlm check` looks at of the section `privacy`."""

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

from kdlm.data import DataSection
from kdlm.methods import Method
from kdlm.privacy.section import refused, stops
from kdlm.privacy.trainer import NO_OPACUS, WEIGHTS
from kdlm.teachers import teachers_of


def looked_at(recipe: Any, method: Method | None) -> Iterator[str]:
    """Look for what breaks the guarantee. Raises ValueError with all of it, one a line, each beginning with its key."""
    section = recipe.privacy
    if section is None:
        return
    problems = [] if find_spec("opacus") else [NO_OPACUS]
    try:
        args = recipe.training.build(output_dir=str(recipe.run_dir), seed=recipe.seed)
    except ValueError:  # which the look at `training` says
        return
    if method is not None:
        problems.extend(refused(args, method, recipe.rollouts))
    if recipe.evaluation is not None and recipe.evaluation.best is not None:
        problems.append("evaluation.best: choosing a checkpoint by evaluation is not accounted for: leave it out")
    problems.extend([] if recipe.guards is None else stops(recipe.guards))
    problems.extend(_data(recipe.data))
    if problems:
        raise ValueError("\n".join(dict.fromkeys(problems)))
    engine = None if recipe.rollouts is None else recipe.rollouts.engine
    for key, asked in (*teachers_of(recipe.teacher), ("rollouts.engine", engine)):
        if hasattr(asked, "url"):
            yield f"privacy: note: {key} is a server: what private rows say is sent to it, and no noise covers that"
    if recipe.data.eval_rows is not None and recipe.data.eval is None:
        yield "privacy: note: data.eval_rows: figures of rows held out are in the model card, and no noise covers those"
    if section.seed is not None:
        yield "privacy: note: privacy.seed is written in recipe.yaml: who knows it can take the noise off again"
    budget = f"epsilon {section.epsilon:g}" if section.epsilon is not None else f"noise {section.noise:g}"
    yield f"privacy: {budget} at delta {section.delta:g}, clipped to {section.clip:g}, by {section.accountant}"


def _data(data: Any) -> Iterator[str]:
    if not isinstance(data, DataSection):
        yield f"privacy: it is for text, and the data are {data.name}"
        return
    if data.streaming:
        yield "data.streaming: the sampling rate needs the number of rows: use streaming: false"
    if data.packing == "pack":
        yield "data.packing: a packed row mixes several units: use none or padding_free"
    if data.eval_fraction is not None:
        yield "data.eval_fraction: how many rows are held out depends on each of them: use eval_rows, or data.eval"
    if any(source.weight is not None for source in data.train):
        yield "data.train: weights of sources make the use of a row depend on others: leave `weight` out"
    if any("weight" in source.columns for source in data.train):
        yield f"data.train: columns.weight: {WEIGHTS}"
