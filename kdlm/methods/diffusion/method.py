"""DiffusionMethod: what all methods of this room share."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

from pydantic import Field
from torch import Tensor, nn

from kdlm.diffusion import AnyTimes, Condition, Draws
from kdlm.methods.diffusion.beside import AnyBeside
from kdlm.methods.method import Batch, Method, Nets, Step, Term, Terms, rows_in
from kdlm.roles import Trainable
from kdlm.section import Section

CONDITIONS = ("labels", "encoder_hidden_states", "encoder_attention_mask", "pooled_projections")
"""Keys of a batch that say what a sample is of."""


class DiffusionMethod(Method):
    """A method on samples: a student denoiser, a teacher that is one, and noise that belongs to the sample.

    Terms are sums over samples of means over their elements.

    Args:
        ema: decay of the average of the student's weights, per step of the student; None keeps none. With an average,
            it is what samples in evaluation and what a finished run exports.
        beside: distances between the samples that a step writes and the data of the batch, beside the method's own
            terms; a method that writes samples adds them by `beside`.
    """

    needs = frozenset({"samples", "teacher.denoiser"})
    paced_by = "samples"

    def __init__(self, *, ema: float | None = None, beside: Sequence[AnyBeside] = ()):
        self.ema, self.distances = ema, {_numbered(beside, i): one for i, one in enumerate(beside)}

    @property
    def computes(self) -> tuple[str, ...]:
        return tuple(self.distances)

    def beside(self, nets: Nets, written: Tensor, batch: Batch, step: Step) -> dict[str, Term]:
        """Return the terms that compare a step's samples, in the student's graph, with the data of the batch.

        A batch of one sample says nothing about a distance of sets, and adds 0.
        """
        if len(written) < 2:
            return {name: Term(0 * written.sum(), "samples") for name in self.distances}
        draws, condition, data = draws_of(batch, step), condition_of(batch), clean_of(batch).to(written.dtype)
        values = {name: one(nets, written, data, draws, condition) for name, one in self.distances.items()}
        return {
            name: Term(value * len(written), "samples", self.distances[name].weight) for name, value in values.items()
        }

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        return {"samples": rows_in(batch)}

    def evaluate(self, nets: Nets, batch: Batch, step: Step) -> Terms:
        """Give the terms of the step after the last, of all roles: schedules at their end, the same noise always."""
        active = frozenset(name for name, role in self.roles.items() if isinstance(role, Trainable))
        still = Step(step.total, step.total, step.epoch, step.seed)
        terms = self.losses(nets, batch, active, still)
        if isinstance(terms, Terms):
            return terms
        several = list(terms)
        return Terms({k: v for one in several for k, v in one.terms.items()})


def _numbered(beside: Sequence[AnyBeside], number: int) -> str:
    """Return the name of a term: its own, with a number where it is not the first of it."""
    same = sum(one.name == beside[number].name for one in beside[:number])
    return beside[number].name + (f" {same + 1}" if same else "")


def clean_of(batch: Batch) -> Tensor:
    """Return the clean samples of a batch."""
    return batch["samples"] if "samples" in batch else batch["pixel_values"]


def condition_of(batch: Batch) -> Condition | None:
    """Return what the samples of a batch are of; None where nothing is said."""
    return {key: batch[key] for key in CONDITIONS if key in batch} or None


def draws_of(batch: Batch, step: Step) -> Draws:
    """Return the random numbers of a batch's samples in a step."""
    return Draws(batch["index"], step.seed, step.index)


def trainable_copy(network: Any) -> nn.Module:
    """Return a copy of a denoiser that trains: what a role that starts from teacher or student is made of."""
    return copy.deepcopy(network).train().requires_grad_(True)


@contextmanager
def held(network: nn.Module) -> Iterator[None]:
    """Let gradients flow through a trained network to its inputs, and not into its parameters."""
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


class DiffusionOptions(Section):
    """What can be asked of any method of this room. Every other field goes to the method by its name."""

    method: ClassVar[type[DiffusionMethod]]
    """The method that this Section configures."""

    ema: float | None = Field(None, gt=0, lt=1)
    """Decay of the average of the student's weights, per step of the student; the average is what is exported."""

    def build(self, losses: Sequence[Any], vocab: Any) -> DiffusionMethod:
        """Return the method. Raises ValueError when the recipe has token losses."""
        if losses:
            raise ValueError(f"losses: {self.method.__name__} has a loss of its own: leave them out")
        return self.method(**self.arguments())

    def arguments(self) -> dict[str, Any]:
        """Return what the method is built with."""
        return {key: value for key, value in self if key != "name"}


class WritingOptions(DiffusionOptions):
    """Of the methods whose steps write samples, in the student's graph."""

    beside: list[AnyBeside] = []
    """Distances between the samples that a step writes and the data, beside the method's own terms."""


__all__ = [
    "AnyTimes",
    "DiffusionMethod",
    "DiffusionOptions",
    "WritingOptions",
    "clean_of",
    "condition_of",
    "draws_of",
    "held",
    "trainable_copy",
]
