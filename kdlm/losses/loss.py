"""Loss: the recipe piece that puts a name, a weight and options to a function of this room."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from kdlm.losses.schedule import Weight, value_at
from kdlm.losses.truncated import on_bucket
from kdlm.section import Section
from kdlm.signal import Dense, Hidden, Mixture, Sampled, TopK

TeacherRows = Tensor | TopK | Sampled | None
"""What a loss sees of the teacher: logits `[rows, vocab]` (`Dense`, `Hidden`, `Mixture`), `TopK`, `Sampled` or None."""


class Loss(Section):
    """One value per row from student logits, what the teacher says, and labels."""

    signals: ClassVar[frozenset[type]] = frozenset()
    """Signal classes that the loss accepts."""
    needs_teacher: ClassVar[bool] = True
    """Whether a teacher must be there."""
    full_vocabulary: ClassVar[bool] = False
    """Whether the student's whole vocabulary is wanted where teacher and student share only a part."""

    weight: Weight = 1.0
    """Factor of this loss in the sum: a number, or a schedule over training."""

    def weight_at(self, progress: float, step: int) -> float:
        """Return the weight after `step` optimiser steps, `progress` (in [0, 1]) of the training."""
        return value_at(self.weight, progress, step)

    def __call__(
        self, student: Float[Tensor, "rows vocab"], teacher: TeacherRows, labels: Int[Tensor, "rows"]
    ) -> Float[Tensor, "rows"]:
        raise NotImplementedError


class Divergence(Loss):
    """A loss that compares two distributions and looks at no label."""

    signals: ClassVar[frozenset[type]] = frozenset({Dense, Hidden, Mixture, TopK})
    divergence: ClassVar[Callable[..., Tensor]]
    """The pure function behind this loss; its keyword options are the fields of the Section."""

    temperature: float = Field(1.0, gt=0)
    """Divides the logits of both models; must be 1 where the teacher gives top-k."""
    t_squared: bool = True
    """Multiply the value by temperature^2 (Hinton). Libraries that leave it out: TRL, Liger, torchtune."""

    def options(self) -> dict[str, Any]:
        """Keyword arguments of the pure function: the fields that are not about the recipe."""
        return {key: value for key, value in self if key not in ("name", "weight")}

    def __call__(
        self, student: Float[Tensor, "rows vocab"], teacher: TeacherRows, labels: Int[Tensor, "rows"] | None = None
    ) -> Float[Tensor, "rows"]:
        if isinstance(teacher, TopK) and TopK in self.signals:
            return on_bucket(self.divergence, student, teacher, **self.options())
        return self.divergence(student, self.whole(teacher), **self.options())

    def whole(self, teacher: TeacherRows) -> Float[Tensor, "rows vocab"]:
        """Return the teacher's logits. Raises ValueError where it gives something else."""
        if isinstance(teacher, Tensor):
            return teacher
        given = "no teacher" if teacher is None else f"a {type(teacher).__name__} signal"
        wanted = ", ".join(sorted(kind.__name__ for kind in self.signals))
        raise ValueError(f"{type(self).__name__} takes a signal of {wanted}, got {given}")


def numbered_names(losses: Sequence[Section]) -> list[str]:
    """Return one name per loss, unique: forward_kl, forward_kl_1, ..."""
    names: list[str] = []
    for loss in losses:
        name: str = loss.name  # type: ignore[attr-defined]
        seen = sum(other.name == name for other in losses[: len(names)])  # type: ignore[attr-defined]
        names.append(f"{name}_{seen}" if seen else name)
    return names
