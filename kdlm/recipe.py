"""Recipe: the whole run as typed data, read from YAML."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from kdlm.data import AnyData
from kdlm.evaluation import EvaluationSection
from kdlm.guards import GuardsSection
from kdlm.losses import AnyLoss
from kdlm.methods import AlignedMethod, AnyMethod
from kdlm.models import AnyStudent
from kdlm.privacy import PrivacySection
from kdlm.quality import SamplingSection
from kdlm.rollouts import RolloutSection
from kdlm.samplers import AnySampler
from kdlm.section import Section
from kdlm.section_loader import load_section
from kdlm.sparsity import SparsitySection
from kdlm.teachers import AnyTeacher
from kdlm.training_arguments import Training
from kdlm.verifiers import AnyVerifier
from kdlm.yaml_document import Problem, RecipeError, dump

__all__ = ["Problem", "Recipe", "RecipeError", "across", "load", "reference_column", "resolved"]


class Recipe(Section):
    """One distillation run. Relative paths are taken from the folder that the command is started in."""

    student: AnyStudent
    """The model that learns."""
    teacher: AnyTeacher | None = None
    """What it learns from; methods that need none can do without."""
    data: AnyData
    """What it learns on: text, unless a `name` says otherwise."""
    sampler: AnySampler | None = None
    """Which training rows are drawn, and how often; without it every row is drawn once an epoch, shuffled."""
    method: AnyMethod
    """What one training step computes."""
    losses: list[AnyLoss] = []
    """The token losses that the method sums."""
    rollouts: RolloutSection | None = None
    """How the student's own text is made, for methods that train on it."""
    sampling: SamplingSection | None = None
    """What evaluation samples and measures, where the student is a denoiser."""
    verifier: AnyVerifier | None = None
    """What says how right the student's own completions are, by a column of the data; methods may use the score."""
    evaluation: EvaluationSection | None = None
    """What is evaluated while the student trains, on which rows, and which checkpoint is handed out."""
    privacy: PrivacySection | None = None
    """What the student may tell of any one training row, bounded by DP-SGD."""
    guards: GuardsSection | None = None
    """What is watched for collapse while a language model trains: figures that warn, and then stop the run."""
    sparsity: SparsitySection | None = None
    """Which weights of the student are pruned, when, and held at zero whatever the method does."""
    training: Training = Field(default_factory=Training)
    """Arguments of the Hugging Face Trainer: steps, batch size, learning rate, precision, logging."""
    run_dir: Path
    """Folder of the run: resolved recipe, metrics, checkpoints and the student."""
    seed: int = Field(0, ge=0)
    """Seed of everything that is drawn at random."""


def load(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe.

    Args:
        path: a YAML file.
        overrides: `dotted.path=value`, the value in YAML, as on the command line: `losses.0.temperature=2`.

    Raises:
        RecipeError: a ValueError with every problem of the file and the overrides, each with its place.
    """
    return load_section(Recipe, path, overrides)


def across(recipe: Recipe) -> bool:
    """Whether the method compares two readings of the text, the student's and the teacher's."""
    return issubclass(getattr(recipe.method, "method", object), AlignedMethod)


def reference_column(recipe: Recipe) -> str | None:
    """Return the column of the data that the verifier, or else the environment, reads; None where neither reads one."""
    environment = None if recipe.rollouts is None else recipe.rollouts.environment
    columns = [recipe.verifier.column if recipe.verifier is not None else None]
    columns.append(environment.reference() if environment is not None else None)
    return next((column for column in columns if column is not None), None)


def resolved(recipe: Recipe) -> str:
    """Write a recipe as YAML with every default spelled out; `load` reads it back as the same recipe.

    `training` keeps only what was set: its other defaults are those of the installed transformers.
    """
    data = recipe.model_dump(mode="json", by_alias=True)
    data["training"] = recipe.training.model_dump(mode="json", exclude_unset=True)
    return dump(_names_first(data))


def _names_first(data: Any) -> Any:
    """Put the `name` that makes a choice in front of what it chooses."""
    if isinstance(data, list):
        return [_names_first(value) for value in data]
    if not isinstance(data, dict):
        return data
    return {key: _names_first(data[key]) for key in sorted(data, key=lambda key: key != "name")}
