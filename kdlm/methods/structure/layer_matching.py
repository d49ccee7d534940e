"""Layer matching: a student's layers learn, each on the teacher's own hidden states, to do what the teacher's do."""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from kdlm.features import fed
from kdlm.losses import count_real, kept_rows, measures_for, real_rows
from kdlm.losses.distributions import widen
from kdlm.methods.method import Batch, Nets, Step, Term, Terms
from kdlm.methods.structure.modules import once_only
from kdlm.methods.tokens import TokenMethod, TokenOptions
from kdlm.models import Ask, layer_paths, replaced_layers
from kdlm.signal import Rows, Signal, weights_of


class LayerMatching(TokenMethod):
    """Match the outputs of layers that are given the teacher's input to the same layer (MaTVLM, arXiv 2503.13440).

    What one layer lacks does not reach the next, so that all of them learn at once. The term is the squared difference
    of the outputs, in mean over width, layers and all positions; the paper's is a sum of norms over positions, padding
    among them, whose size grows with the length. Token losses, of a second pass in which the student's layers feed one
    another, may stand beside it: MaTVLM has cross-entropy of weight 1 and forward KL of weight 0.1. From notes of the
    paper and its released code; formula, gradient and invariance are in our tests.

    Args:
        losses: token losses added to the matching term.
        layers: layers to match, counted from 0; None takes those of the student whose mixer is not attention.
        weight: factor on the matching term.
    """

    paper = "arXiv 2503.13440"
    needs = frozenset({"labels", "teacher", "teacher.layers"})
    weighs = True
    leaves_unused = True  # pyright: ignore[reportAssignmentType]  what is not matched, where there are no token losses

    def __init__(self, losses=(), *, layers: Sequence[int] | None = None, weight: float = 1.0, **options):
        super().__init__(losses, **options)
        self.layers, self.weight = layers, weight

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        return super().counts(batch) | {"positions": count_real(batch)}

    def losses(self, nets: Nets, batch: Batch, active: frozenset[str], step: Step) -> Terms:
        matched, teacher = self._match(nets, batch)
        terms, metrics = (
            {"layers": Term(matched, "positions", self.weight)},
            {"layers": (matched.detach(), "positions")},
        )
        if self.token_losses:
            rows = kept_rows(batch["labels"], weights_of(batch))
            read = self.compare(nets["student"](batch, rows), teacher, rows, step)
            terms, metrics = terms | read.terms, metrics | read.metrics
        return Terms(terms, metrics)

    def evaluate(self, nets: Nets, batch: Batch, step: Step) -> Terms:
        matched, teacher = self._match(nets, batch)
        rows = kept_rows(batch["labels"], weights_of(batch))
        read = self.compare(nets["student"](batch, rows), teacher, rows, step, measures_for(type(teacher)))
        terms = {"layers": Term(matched, "positions", self.weight)} | (read.terms if self.token_losses else {})
        return Terms(terms, {"layers": (matched, "positions")} | read.metrics)

    def _match(self, nets: Nets, batch: Batch) -> tuple[Tensor, Signal]:
        """Return the sum over positions of the layers' mean squared difference, and what the teacher says."""
        student, teacher, rows = nets["student"], nets["teacher"], real_rows(batch)
        once_only(student.module)
        layers = self._chosen(student, teacher)
        needed = sorted({*layers, *(layer - 1 for layer in layers if layer)})
        ask = Ask(layers=needed, embeddings=0 in layers)
        signal, taught = teacher.inside(batch, rows, ask, kept_rows(batch["labels"]))
        states = dict(zip(needed, taught.hidden, strict=True)) | {-1: taught.embeddings}
        paths, shape = layer_paths(student.module), batch["input_ids"].shape
        dtype = student.module.dtype
        given = {paths[layer]: _laid_out(states[layer - 1].to(dtype), rows, shape) for layer in layers}
        with fed(student.module, given):
            _, learnt = student.inside(batch, rows, Ask(layers=layers))
        differences = [
            (widen(ours) - widen(states[layer])).square().mean(-1)
            for layer, ours in zip(layers, learnt.hidden, strict=True)
        ]
        return rows.sum(torch.stack(differences).mean(0)), signal

    def _chosen(self, student: Any, teacher: Any) -> Sequence[int]:
        """Return the layers to match. Raises ValueError where there are none, or not in both."""
        layers = replaced_layers(student.module.config) if self.layers is None else self.layers
        if not layers:
            raise ValueError("method.layers: the student has no replaced layers (student: {name: replaced}); name some")
        for what, model in (("student", student), ("teacher", teacher)):
            if model.num_layers <= max(layers):
                raise ValueError(f"method.layers: {list(layers)}: the {what} has {model.num_layers} layers")
        if student.hidden_size != teacher.hidden_size:
            raise ValueError(
                f"method: layers of width {student.hidden_size} cannot be given the states of a teacher of width "
                f"{teacher.hidden_size}"
            )
        return layers


def _laid_out(x: Float[Tensor, "rows width"], rows: Rows, shape: torch.Size) -> Float[Tensor, "batch length width"]:
    """Return states at their positions of the batch, zeros where there is padding."""
    return x.new_zeros(shape.numel(), x.shape[-1]).index_copy(0, rows.index, x).view(*shape, -1)


class LayerMatchingSection(TokenOptions):
    """Match the outputs of layers that are given the teacher's hidden states; token losses beside."""

    method: ClassVar = LayerMatching
    name: Literal["layer_matching"] = "layer_matching"
    layers: list[int] | None = Field(None, min_length=1)
    """Layers to match, counted from 0; by default those that a `replaced` student has in place of attention."""
    weight: float = Field(1.0, ge=0)
    """Weight of the matching term."""
