"""What is mixed: the file that `kdlm mix` reads."""

import os
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from kdlm.section import Section


class Candidates(Section):
    """Which mixtures are drawn: Dirichlet samples around the sizes of the sources."""

    strength: tuple[float, float] = (0.5, 5.0)
    """How near they are to the sizes, drawn between the two evenly in the logarithm: little gives lopsided ones."""
    exponent: float = Field(0.7, ge=0)
    """The sizes are raised to this power: below 1 small sources get more than their share."""
    most: float = Field(4.0, gt=0)
    """How often the real run may go through a source at most."""
    least: float = Field(2e-4, ge=0, lt=1)
    """Least weight of a source."""
    pool: int = Field(200_000, ge=1)
    """Mixtures that a prediction is asked of."""
    average: int = Field(1280, ge=1)
    """The best of them that are averaged in the end, and among which the later rounds draw."""

    @model_validator(mode="after")
    def _a_range(self) -> "Candidates":
        if not 0 < self.strength[0] <= self.strength[1]:
            raise ValueError("strength: two numbers above 0, the lesser first")
        return self


class Mixture(Section):
    """Weights of a recipe's training sources, to be found by DeMix (arXiv 2602.00747).

    One component model is trained on each source, all from the student of the recipe. Of a mixture, the average of
    the components with its weights is judged in place of a model that was trained on it. A regression says which
    mixtures to judge next, and which are best. Relative paths are taken from the folder that the command is started in.
    """

    recipe: Path
    """YAML file of the recipe: its `data.train` are the sources, its student is what all components begin as, its
    evaluation judges."""
    overrides: list[str] = []
    """Keys to change in every component and in the recipe that comes out: `training.max_steps=200`."""
    seed: int = Field(0, ge=0)
    """Seed of the components and of what is drawn."""
    metric: str = "eval_cross_entropy"
    """The figure of an evaluation that mixtures are judged by."""
    better: Literal["lower", "higher"] = "lower"
    """Which way it is better."""
    evaluations: int = Field(64, ge=4)
    """Mixtures that are judged in the first of three rounds; half as many in the second, a quarter in the third."""
    candidates: Candidates = Candidates()
    """Which mixtures are drawn."""
    samples: int | None = Field(None, ge=1)
    """Sequences that the real run will train on, by which `candidates.most` counts; those of the recipe's `max_steps`
    on one process, or of its epochs, when not set."""
    workers: int = Field(default_factory=lambda: os.cpu_count() or 1, ge=1)
    """Components that are trained at once, each in a process of its own."""
    threads: int | None = Field(None, ge=1)
    """Threads of each: by default 1, and all cores where there is one worker."""
    output: Path
    """Folder of the weights, the recipe and, below it, of every component."""
