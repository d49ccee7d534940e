"""Layer matching: a student's layers learn, each on the teacher's own hidden states, to do what the teacher's do."""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from kdlm.features import fed, passed
from kdlm.losses import count_real, kept_rows, measures_for, real_rows
from kdlm.methods.method import Batch, Nets, Step, Term, Terms
from kdlm.methods.structure.inside import dense_model, once_only
from kdlm.methods.tokens import TokenMethod, TokenOptions
from kdlm.models import layer_paths, replaced_layers
from kdlm.signal import Signal, weights_of


class LayerMatching(TokenMethod):
    """Match the outputs of layers that are given the teacher's input to the same layer (MaTVLM, arXiv 2503.13440).

    What one layer lacks does not reach the next, so that all of them learn at once. The term is the squared difference
    of the outputs, in mean over width, layers and all positions; the paper's is a sum of norms over positions, padding
    among them, whose size grows with the length. Token losses, of a second pass in which the student's layers feed one
    another, may stand beside it: MaTVLM has cross-entropy of weight 1 and forward KL of weight 0.1. From a card of the
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
        student, kept, rows = nets["student"], kept_rows(batch["labels"]), real_rows(batch)
        module, whose = student.module, dense_model(nets["teacher"])
        once_only(module)
        layers = self._chosen(module, whose)
        ours, theirs = ([layer_paths(one)[layer] for layer in layers] for one in (module, whose))
        with passed(whose, theirs) as taught:
            signal = nets["teacher"](batch, kept)
        home = batch["input_ids"].device
        given = [(taught[path][0].to(home), taught[path][1].to(home)) for path in theirs]
        with fed(module, {path: x for path, (x, _) in zip(ours, given, strict=True)}), passed(module, ours) as learnt:
            student(batch, kept)
        differences = [
            (_wide(rows.select(learnt[path][1])) - _wide(rows.select(y))).square().mean(-1)
            for path, (_, y) in zip(ours, given, strict=True)
        ]
        return rows.sum(torch.stack(differences).mean(0)), signal

    def _chosen(self, student: Any, teacher: Any) -> Sequence[int]:
        """Return the layers to match. Raises ValueError where there are none, or not in both."""
        layers = replaced_layers(student.config) if self.layers is None else self.layers
        if not layers:
            raise ValueError("method.layers: the student has no replaced layers (student: {name: replaced}); name some")
        for what, model in (("student", student), ("teacher", teacher)):
            if (most := len(layer_paths(model))) <= max(layers):
                raise ValueError(f"method.layers: {list(layers)} is out of range: the {what} has {most} layers")
        ours, theirs = (one.config.get_text_config().hidden_size for one in (student, teacher))
        if ours != theirs:
            raise ValueError(
                f"method: layers of width {ours} cannot be given the states of a teacher of width {theirs}"
            )
        return layers


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


class LayerMatchingSection(TokenOptions):
    """Match the outputs of layers that are given the teacher's hidden states; token losses beside."""

    method: ClassVar = LayerMatching
    name: Literal["layer_matching"] = "layer_matching"
    layers: list[int] | None = Field(None, min_length=1)
    """Layers to match, counted from 0; by default those that a `replaced` student has in place of attention."""
    weight: float = Field(1.0, ge=0)
    """Weight of the matching term."""
