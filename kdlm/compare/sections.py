"""What is compared: the file that `kdlm compare` reads."""

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from kdlm.section import Section

Way = Literal["lower", "higher"]
"""Which is better."""
NAME = re.compile(r"[A-Za-z0-9][\w.+-]*")


class Candidate(Section):
    """One recipe of a comparison."""

    recipe: Path
    """YAML file of the recipe."""
    overrides: list[str] = []
    """Keys to change, as on the command line of `kdlm train`: `losses.0.temperature=2`."""


class Numbers(Section):
    """A range to draw a number from."""

    low: float
    """Least value."""
    high: float
    """Greatest value."""
    log: bool = False
    """Draw evenly in the logarithm: for rates and weights."""
    whole: bool = False
    """Draw whole numbers only."""

    @model_validator(mode="after")
    def _a_range(self) -> "Numbers":
        if not self.low < self.high or (self.log and self.low <= 0):
            raise ValueError("low must be below high, and above 0 where log is true")
        return self


class Choices(Section):
    """Values to choose from, of any kind: whole sections of a recipe too."""

    choices: list[Any] = Field(min_length=2)
    """The values, as a recipe would have them."""


class Search(Section):
    """Looks for the best values of some keys of a recipe, by Optuna's tree-structured Parzen estimator.

    That is how AutoDistiller recommends a pipeline: scores of past runs say which of the untried ones to try. The best
    one is then run on all seeds, as `best` beside the runs. It was chosen by what it is ranked by, on the first seed:
    there its lead is flattered.
    """

    recipe: Path
    """YAML file of the recipe that is varied; a key `recipe` in `space` chooses among files instead."""
    overrides: list[str] = []
    """Keys to change in all trials."""
    space: dict[str, Numbers | Choices] = Field(min_length=1)
    """Dotted key of the recipe -> what it may be; `recipe` -> files to start from."""
    trials: int = Field(20, ge=1)
    """Runs, all with the first of the seeds; finished ones count when a search goes on."""
    seed: int = Field(0, ge=0)
    """Seed of the proposals."""


class Comparison(Section):
    """Recipes to run on the same seeds. Relative paths are taken from the folder that the command is started in."""

    runs: dict[str, Candidate] = {}
    """Name -> recipe. A name is a folder's too: letters, digits and `_.+-`."""
    overrides: list[str] = []
    """Keys to change in every run, before its own: `training.max_steps=200` gives all the same budget."""
    seeds: list[Annotated[int, Field(ge=0)]] = Field([0, 1, 2], min_length=1)
    """Every run is made once for each: `seed` of its recipe, and of a student that begins with random weights."""
    metrics: dict[str, Way] = Field(
        {"eval_cross_entropy": "lower", "eval_kl_to_teacher": "lower", "eval_top1_agreement": "higher"}, min_length=1
    )
    """Figure of a run's `results.json` -> which is better; runs are ranked by the first."""
    baseline: str | None = None
    """Name of the run that the others are compared with, seed by seed."""
    search: Search | None = None
    """What to search for beside the runs."""
    workers: int = Field(default_factory=lambda: os.cpu_count() or 1, ge=1)
    """Runs at once, each in a process of its own; by default as many as there are cores."""
    threads: int | None = Field(None, ge=1)
    """Threads of each: by default 1, and all cores where there is one worker. Another number may move last digits."""
    report: bool = False
    """Write `report.html` too, the curves and recipes of all runs (`kdlm report`; tokens are for that command)."""
    output: Path
    """Folder of the table and, below it, of every run: NAME-SEED."""

    @model_validator(mode="after")
    def _makes_sense(self) -> "Comparison":
        if not self.runs and self.search is None:
            raise ValueError("nothing to run: name runs, or a search")
        if wrong := [name for name in self.runs if not NAME.fullmatch(name)]:
            raise ValueError(f"runs: {wrong[0]!r} is no name of a folder: letters, digits and _.+-")
        if self.baseline is not None and self.baseline not in self.runs:
            raise ValueError(f"baseline: no run is called {self.baseline!r}. There are: {', '.join(self.runs)}")
        if self.search is not None and "best" in self.runs:
            raise ValueError("runs: `best` is the name of what the search finds; choose another")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("seeds: each may be there once")
        return self
