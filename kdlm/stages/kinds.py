"""What a stage may do: train, make rows, capture signals. Where each is told where to work, and what it leaves."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kdlm.curation import Pipeline
from kdlm.recipe import Recipe, resolved
from kdlm.yaml_document import dump


@dataclass(frozen=True)
class Kind:
    """What stages of one kind have in common.

    Attributes:
        does: the key of the stage that says so.
        section: what the file holds.
        places: dotted keys of it that the run of stages sets -> where that is, below the folder of the stage.
        leaves: the file or folder that is handed on, below the folder of the stage.
        called: what that is, in words.
        taken_as: where a later stage may name it, in words.
    """

    does: str
    section: type[Recipe] | type[Pipeline]
    places: Mapping[str, str]
    leaves: str
    called: str
    taken_as: str

    @property
    def file(self) -> str:
        """What the stage was asked to do, in its folder."""
        return f"{self.does}.yaml"


KINDS = {
    kind.does: kind
    for kind in (
        Kind("recipe", Recipe, {"run_dir": ""}, "student", "a student", "the path of a model"),
        Kind("pipeline", Pipeline, {"output": ""}, "rows.parquet", "rows", "the path of a source"),
        Kind(
            *("capture", Recipe, {"run_dir": "", "teacher.path": "store"}, "store"),
            *("signals of a teacher", "`path` of a teacher `cached`"),
        ),
    )
}


def taken_as(holder: Any, path: tuple[Any, ...]) -> str:
    """Return which kind of stage leaves what a key takes.

    Args:
        holder: the mapping that the key stands in.
        path: of the key.
    """
    if isinstance(holder, Mapping) and holder.get("name") == "cached" and path[-1] == "path":
        return "capture"
    if isinstance(holder, Mapping) and "name" not in holder and path[-1] == "path" and isinstance(path[-2], int):
        return "pipeline"
    return "recipe"


def spelled(section: Recipe | Pipeline) -> str:
    """Write what a stage does as YAML with every default."""
    return resolved(section) if isinstance(section, Recipe) else dump(section.model_dump(mode="json"))
