"""A run of several stages as typed data: what its YAML file holds."""

from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from kdlm.recipe import Recipe
from kdlm.section import Section

WORD = "stage:"
"""What stands before the name of a stage where a later one names what it leaves."""

DOES = ("recipe", "pipeline", "capture")
"""Keys that say what a stage does."""


class Stage(Section):
    """One run of several: a recipe, a pipeline or a capture, and what goes on from the stages before it."""

    name: str = Field(pattern=r"^[A-Za-z0-9][\w-]*$")
    """What the stage is called: its folder is RUN_DIR/NAME, and later stages name what it leaves `stage:NAME`."""
    recipe: Path | dict[str, Any] | None = None
    """The stage trains, and leaves a student. The recipe: its file, from the folder of this one, or its keys. The
    `run_dir` of a file does not count."""
    pipeline: Path | dict[str, Any] | None = None
    """Instead: the stage makes rows, as `kdlm generate` does. The pipeline: its file or its keys, likewise. The
    `output` of a file does not count."""
    capture: Path | dict[str, Any] | None = None
    """Instead: the stage writes a teacher's signals to disk, as `kdlm capture` does. A recipe with a teacher `cached`:
    its file or its keys, likewise. The `teacher.path` of a file does not count."""
    set: dict[str, Any] = {}
    """Keys of the recipe or pipeline to change, dotted as on the command line: `training.max_steps: 200`."""
    carry: list[str] = []
    """Networks that a method trains beside the student, by role, and that go on as the stage that the student comes
    from left them: `projectors`. The others begin anew."""
    skip: bool = False
    """Leave the stage out: `stage:NAME` is then the student that the stage would have begun with."""

    @property
    def does(self) -> str:
        """Which of DOES is said."""
        return next(key for key in DOES if getattr(self, key) is not None)

    @model_validator(mode="after")
    def _does_one_thing(self) -> "Stage":
        said = [key for key in DOES if getattr(self, key) is not None]
        if len(said) != 1:
            raise ValueError(f"say one of recipe, pipeline and capture, not {' and '.join(said) or 'none'}")
        if self.carry and said != ["recipe"]:
            raise ValueError(f"carry: a {said[0]} trains no networks that could go on: leave it out")
        return self


class Stages(Section):
    """Runs that follow one another. A stage may name what an earlier one leaves, `stage:NAME`: a student wherever the
    path of a model is taken, rows as the path of a source, signals as the path of a teacher `cached`. Optimiser,
    schedule and steps begin anew."""

    run_dir: Path
    """Folder of the whole: `stages.yaml` with every default, `results.json`, and a folder for each stage."""
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
