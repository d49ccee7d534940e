"""Hidden-state distillation: chosen student layers follow chosen teacher layers, through projectors or relations."""

import math
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from kdlm.diffusion import Draws
from kdlm.losses import kept_rows, measures_for, rkd_angle, rkd_distance
from kdlm.methods.method import Batch, Nets, Step, Term, Terms
from kdlm.methods.tokens import TokenMethod, TokenOptions
from kdlm.roles import Role, Trainable
from kdlm.signal import weights_of


class HiddenKD(TokenMethod):
    """Match hidden states of mapped layers after a learned linear map (FitNets, arXiv 1412.6550; TinyBERT 1909.10351).

    The projectors are a role of their own: trained and checkpointed beside the student, never exported with it.

    Relations (RKD, CVPR 2019, arXiv 1904.05068) need none: `rkd_distance + 2 rkd_angle` between kept positions of the
    micro-batch, the paper's ratio of the two. As they take positions^3 numbers, at most `related` positions of a
    micro-batch are compared, drawn anew at each step; their mean stands for all. A relation is of several rows, and
    no one row's weight is its own: rows that have weights are refused.

    Args:
        losses: token losses added to the hidden-state term.
        layers: (student layer, teacher layer) pairs, 0 is the first decoder layer; None maps four student layers
            (or all, if fewer) evenly onto the teacher's depth, last to last.
        distance: `cosine` (1 - cos) or `mse` (mean over the width), per kept position; or `rkd`, between positions.
        related: positions that `rkd` compares.
        weight: factor on the mean over layers and positions.
        projector_learning_rate: the projectors' own rate; None follows the run.
    """

    paper = "arXiv 1412.6550"
    needs = frozenset({"labels", "teacher", "teacher.layers"})
    weighs = True

    def __init__(
        self, losses=(), *, layers=None, distance="cosine", weight=1.0, related=64, projector_learning_rate=None,
        **options,
    ):  # fmt: skip
        super().__init__(losses, **options)
        self.layers: list[tuple[int, int]] | None = layers
        self.distance, self.weight, self.related = distance, weight, related
        self.weighs = distance != "rkd"
        self.projector_learning_rate = projector_learning_rate

    @property
    def roles(self) -> dict[str, Role]:
        if self.distance == "rkd":
            return {"student": Trainable()}
        projectors = Trainable(make=self._projectors, learning_rate=self.projector_learning_rate)
        return {"student": Trainable(), "projectors": projectors}

    @property
    def leaves_unused(self) -> bool:
        return not self.token_losses  # the layers above the last mapped one

    def losses(self, nets: Nets, batch: Batch, active: frozenset[str], step: Step) -> Terms:
        return self._match(nets, batch, step)

    def evaluate(self, nets: Nets, batch: Batch, step: Step) -> Terms:
        """Give the step's own terms, and every measure that can be taken with this teacher."""
        return self._match(nets, batch, step, measured=True)

    def _match(self, nets: Nets, batch: Batch, step: Step, *, measured: bool = False) -> Terms:
        rows = kept_rows(batch["labels"], weights_of(batch))
        ours, theirs = zip(*self._mapped(nets["student"], nets["teacher"]), strict=True)
        teacher, targets = nets["teacher"].with_layers(batch, rows, theirs)
        student, hidden = nets["student"].with_layers(batch, rows, ours)
        if self.distance == "rkd":
            distances = [self._relations(h, target, step) for h, target in zip(hidden, targets, strict=True)]
        else:
            distances = [
                self._distance(projector(h.to(projector.weight.dtype)), target)  # a bf16 student, fp32 projectors
                for projector, h, target in zip(nets["projectors"], hidden, targets, strict=True)
            ]
        matched = rows.sum(torch.stack(distances).mean(0))
        terms, metrics = {"hidden": Term(matched, weight=self.weight)}, {"hidden": (matched.detach(), "tokens")}
        if self.token_losses or measured:
            logits = self.compare(student, teacher, rows, step, measures_for(type(teacher)) if measured else ())
            terms |= logits.terms if self.token_losses else {}
            metrics |= logits.metrics
        return Terms(terms, metrics)

    def _distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        student, teacher = student.float(), teacher.float()
        if self.distance == "cosine":
            return 1 - nn.functional.cosine_similarity(student, teacher, dim=-1)
        return (student - teacher).square().mean(-1)

    def _relations(self, student: Tensor, teacher: Tensor, step: Step) -> Tensor:
        """Return the mean relation of the compared positions, for each position."""
        every = torch.arange(len(student), device=student.device)
        chosen = Draws(every, step.seed, step.index).uniform("related").argsort()[: self.related]
        student, teacher = student[chosen], teacher[chosen]
        value = rkd_distance(student, teacher) + 2 * rkd_angle(student, teacher)
        return value.sum().div(max(1, len(chosen))).expand(len(every))

    def _mapped(self, student: Any, teacher: Any) -> list[tuple[int, int]]:
        """Return the pairs of layers. Raises ValueError where one is out of range."""
        if self.layers is None:
            count = min(4, student.num_layers)
            ends = [math.ceil((i + 1) * student.num_layers / count) - 1 for i in range(count)]
            self.layers = [(s, math.ceil((s + 1) * teacher.num_layers / student.num_layers) - 1) for s in ends]
        for ours, theirs in self.layers:
            if not (0 <= ours < student.num_layers and 0 <= theirs < teacher.num_layers):
                raise ValueError(
                    f"method.layers: [{ours}, {theirs}] is out of range: the student has {student.num_layers} layers, "
                    f"the teacher {teacher.num_layers}"
                )
        return self.layers

    def _projectors(self, student: Any, teacher: Any) -> nn.ModuleList:
        pairs = self._mapped(student, teacher)
        return nn.ModuleList(nn.Linear(student.hidden_size, teacher.hidden_size, bias=False) for _ in pairs)


class HiddenKDSection(TokenOptions):
    """Match hidden states of mapped layers, through learned projectors or by their relations; token losses beside."""

    method: ClassVar = HiddenKD
    name: Literal["hidden_kd"] = "hidden_kd"
    layers: list[tuple[int, int]] | None = None
    """[student layer, teacher layer] pairs, counted from 0; by default up to four, spread evenly."""
    distance: Literal["cosine", "mse", "rkd"] = "cosine"
    """What is minimised between a projected student state and the teacher's; `rkd` compares the distances and angles
    between positions in its place, without projectors."""
    weight: float = Field(1.0, ge=0)
    """Weight of the hidden-state term; for `rkd` the paper has 25."""
    related: int = Field(64, ge=3)
    """Positions of a micro-batch that `rkd` compares, drawn at each step; memory grows with the cube of it."""
    projector_learning_rate: float | None = Field(None, gt=0)
    """Learning rate of the projectors; by default the run's."""
