"""A run of several stages as typed data: what its YAML file holds."""

from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from kdlm.recipe import Recipe
from kdlm.section import Section

WORD = "stage:"
"""What stands before the name of a stage where a recipe names the student that it leaves."""


class Stage(Section):
    """One run of several: a recipe, and what goes on from the stages before it."""

    name: str = Field(pattern=r"^[A-Za-z0-9][\w-]*$")
    """What the stage is called: its run folder is RUN_DIR/NAME, and later stages name its student `stage:NAME`."""
    recipe: Path | dict[str, Any]
    """The recipe: its file, from the folder of this one, or its keys. The `run_dir` of a file does not count."""
    set: dict[str, Any] = {}
    """Keys of the recipe to change, dotted as on the command line: `training.max_steps: 200`."""
    carry: list[str] = []
    """Networks that a method trains beside the student, by role, and that go on as the stage that the student comes
    from left them: `projectors`. The others begin anew."""
    skip: bool = False
    """Leave the stage out: `stage:NAME` is then what the stage would have begun with."""


class Stages(Section):
    """Runs that follow one another, each a recipe. A stage may name the student that an earlier one leaves,
    `stage:NAME`, wherever a recipe takes the path of a model; optimiser, schedule and steps begin anew."""

    run_dir: Path
    """Folder of the whole: `stages.yaml` with every default, `results.json`, and a run folder for each stage."""
    stages: list[Stage] = Field(min_length=1)
    """What is run, in order."""

    @model_validator(mode="after")
    def _names(self) -> "Stages":
        for number, stage in enumerate(self.stages):
            if stage.name in {*Recipe.model_fields, *Stages.model_fields}:
                raise ValueError(f"stages.{number}.name: {stage.name!r} is a key of a recipe: choose another name")
            if stage.name in [before.name for before in self.stages[:number]]:
                raise ValueError(f"stages.{number}.name: {stage.name!r} is the name of an earlier stage already")
        return self
