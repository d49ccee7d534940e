"""Components: one model a source, as runs of a comparison; and what the average of them scores."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from rich.console import Console
from torch import Tensor

from kdlm.compare import Comparison
from kdlm.compare.planned import Planned, planned
from kdlm.compare.running import made
from kdlm.compare.sections import Candidate
from kdlm.data import DataSection
from kdlm.mix.sections import Mixture
from kdlm.plan import settled
from kdlm.progress import Display
from kdlm.recipe import Recipe, load
from kdlm.train import assemble

SCORES = "scores.jsonl"
"""File of the judgements, in the folder of a mixture: each is of the components that are there."""


def whole(mixture: Mixture) -> Recipe:
    """Return the recipe that is mixed for. Raises ValueError, naming the key, for what has no mixture to be found."""
    recipe = load(mixture.recipe, [*mixture.overrides, f"seed={mixture.seed}", f"run_dir={mixture.output / 'run'}"])
    data = recipe.data
    if not isinstance(data, DataSection) or len(data.train) < 2:
        raise ValueError("recipe: mixing takes text with several training sources")
    if data.streaming:
        raise ValueError("recipe: data.streaming: how large a stream is cannot be known: leave it out")
    if not (data.eval or data.eval_rows or data.eval_fraction):
        raise ValueError("recipe: there are no rows to judge by: set data.eval")
    if getattr(recipe.student, "lora", None) is not None:
        raise ValueError("recipe: student.lora: components are averaged as whole models: train without adapters")
    if recipe.method.build(recipe.losses, None).exported != "student":
        raise ValueError(f"recipe: {recipe.method.name} hands out an average of its own: use another method")
    return recipe


def components(mixture: Mixture, recipe: Recipe, console: Console) -> list[Planned]:
    """Train the components that are not there yet and return all, in the order of the sources.

    Raises ValueError with all that is wrong with any, or the last words of one that failed.
    """
    runs = {}
    data: Any = recipe.data  # it is text
    for name, source in zip(names(recipe), data.train, strict=True):
        alone = json.dumps([source.model_dump(mode="json", exclude_unset=True, exclude={"weight"})])
        runs[name] = Candidate(recipe=mixture.recipe, overrides=[f"data.train={alone}"])
    comparison = Comparison(
        runs=runs,
        overrides=mixture.overrides,
        seeds=[mixture.seed],
        metrics={mixture.metric: mixture.better},
        workers=mixture.workers,
        threads=mixture.threads,
        output=mixture.output / "components",
    )
    found = planned(comparison)
    if not all(run.finished for run in found):
        (mixture.output / SCORES).unlink(missing_ok=True)  # of components that are no longer there
    if failed := made(found, comparison, console):
        folder, lines = next(iter(failed.items()))
        raise ValueError(f"{folder}: the component failed; the others are kept\n{lines}")
    return found


def names(recipe: Recipe) -> list[str]:
    """Return what the sources are called: their domain or path, as a name of a folder, each once."""
    found: list[str] = []
    data: Any = recipe.data  # it is text
    for source in data.train:
        name = re.sub(r"[^A-Za-z0-9_.+-]+", "-", source.domain or source.path).strip("-._+") or "source"
        found.append(f"{name}-{len(found)}" if name in found else name)
    return found


class Proxies:
    """Scores averages of the components, which stand in for models that were trained on mixtures.

    Attributes:
        sizes: sequences of each source.

    Raises ValueError where a component does not fit the student.
    """

    def __init__(self, mixture: Mixture, recipe: Recipe, folders: Sequence[Path]):
        self.metric = mixture.metric
        training = recipe.training.model_copy(update={"report_to": "none"})
        run = assemble(settled(recipe.model_copy(update={"training": training}))[0])
        self.trainer = run.trainer
        self.trainer.remove_callback(Display)
        self.sizes = np.array([float(report.sequences) for report in run.data.report.train])
        self.states: list[dict[str, Tensor]] = []
        for folder in folders:
            self.trainer._load_student(str(folder))
            state = self.trainer.student.state_dict()
            self.states.append({name: value.detach().cpu().clone() for name, value in state.items()})

    def score(self, weights: Float[np.ndarray, "sources"]) -> float:
        """Return the metric of the average. Raises ValueError, naming those there are, where it is not reported."""
        with torch.no_grad():
            for name, value in self.trainer.student.state_dict().items():
                value.copy_(average([state[name] for state in self.states], weights))
        found = self.trainer.evaluate()
        if self.metric not in found:
            known = ", ".join(name for name, value in found.items() if isinstance(value, float))
            raise ValueError(f"metric: {self.metric} is not reported. There are: {known}")
        return float(found[self.metric])

    def close(self) -> None:
        """Let go of what an evaluation holds."""
        self.trainer.close()


def average(tensors: Sequence[Tensor], weights: Any) -> Tensor:
    """Return sum_i w_i theta_i, in float32 at least; what is no float is that of the first, and must be that of all.

    With all weight on one it is that one, bit for bit.
    """
    if not tensors[0].is_floating_point():
        if not all(torch.equal(tensors[0], other) for other in tensors[1:]):
            raise ValueError("the components differ in what is no weight: they are not of one beginning")
        return tensors[0]
    kept = [(tensor, float(weight)) for tensor, weight in zip(tensors, weights, strict=True) if weight != 0]
    exact = torch.promote_types(tensors[0].dtype, torch.float32)
    return torch.stack([tensor.to(exact) * weight for tensor, weight in kept]).sum(0).to(tensors[0].dtype)
