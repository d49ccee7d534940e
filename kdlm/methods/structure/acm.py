"""Adaptive computation modules: learners, gates, and both end to end within a budget (ACM, arXiv 2312.10193)."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from kdlm.features import passed, recorded
from kdlm.losses import count_real, kept_rows, measures_for, real_rows
from kdlm.losses.distributions import widen
from kdlm.methods.method import Batch, Nets, Step, Term, Terms
from kdlm.methods.sequences import over_sequences
from kdlm.methods.structure.gates import adaptive, gumbel, lengths_of, worthwhile
from kdlm.methods.structure.modules import dense_model, once_only
from kdlm.methods.tokens import TokenMethod, TokenOptions
from kdlm.models import chosen, noisy
from kdlm.signal import Rows, sequence_of, weights_of

Stage = Literal["learners", "gates", "whole"]


class ACM(TokenMethod):
    """One of the three stages in which an `adaptive` student learns (arXiv 2312.10193).

    `learners`: what the first n of them give is near to what the dense layer gives, for every n, on the input that the
    teacher's own layer had: mean squared errors, all layers at once. The student's source is the teacher.

    `gates`: a gate names the smallest n >= 2 with d(n) / d(n - 1) >= tau, the learner that hardly brought the error d
    down, and all of them where there is none: cross-entropy. Learners have no part in it and do not move.

    `whole`: the recipe's losses on the student as it runs, its choices drawn (straight-through Gumbel), and

        + budget_weight |mean share - budget|      share: k / learners, mean over layers and all tokens of the step
        - entropy_weight mean_s H(choices of s) / log(learners + 1)
        - diversity_weight mean_s |share of s - mean share|

    over sequences s, at the gates' likeliest choices, which a finished student makes. The mean share of a step is not
    known to one of its micro-batches; its sign against the budget, and the mean in the last term, are those of the step
    before, so that the gradient does not depend on how a batch is cut (the first step has neither term). A budget of 1
    bounds nothing, and has no cost term.

    Ours, on purpose: learners are groups of the source's own neurons, where the paper's begin as new layers; the last
    term stands for the mean difference of all pairs of samples, which would depend on the cut, and is subtracted, as in
    the authors' code (the text adds it, which would do the reverse of what it is for); the share is that of the
    likeliest choices, where their code takes the drawn ones; H is that of the mean probabilities. Stages, labels and
    weights are as notes of the paper's text have them; its figures are not reproduced. tau is not given there: their
    code has 1 / 1.2, for learners that begin as new layers.

    Args:
        losses: token losses of the stage `whole`.
        stage: see above.
        tau: ratio of errors from which on a learner is not worth its cost.
        budget: share of the learners that a token should use in mean.
        budget_weight, entropy_weight, diversity_weight: factors on the three terms.
    """

    paper = "arXiv 2312.10193"
    weighs = True
    leaves_unused = True  # pyright: ignore[reportAssignmentType]  each stage trains its part, and k = 0 none of it

    def __init__(
        self, losses=(), *, stage: Stage = "whole", tau=0.7, budget=0.5, budget_weight=0.1, entropy_weight=0.05,
        diversity_weight=0.05, **options,
    ):  # fmt: skip
        super().__init__(losses, **options)
        self.runs_parts = stage != "whole"
        self.stage, self.tau, self.budget = stage, tau, budget
        self.budget_weight, self.entropy_weight, self.diversity_weight = budget_weight, entropy_weight, diversity_weight
        self.needs = frozenset({"labels", "teacher"} if any(loss.needs_teacher for loss in losses) else {"labels"})
        if stage == "whole":
            self.follows = ("share",)
        else:
            self.needs = frozenset({"labels", "teacher", "teacher.layers"})
        self.mean = torch.tensor(float("nan"))

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        sequences = over_sequences(lengths_of(batch, real_rows(batch)) > 0, batch)
        return super().counts(batch) | {"positions": count_real(batch), "sequences": sequences}

    def losses(self, nets: Nets, batch: Batch, active: frozenset[str], step: Step) -> Terms:
        if self.stage != "whole":
            return self._beside(nets, batch)
        once_only(nets["student"].module)
        rows = kept_rows(batch["labels"], weights_of(batch))
        noise = gumbel(adaptive(nets["student"].module), batch, step)
        teacher = self.ask_teacher(nets, batch, rows)
        student, terms = self._run(nets["student"], batch, rows, noise)
        read = self.compare(student, teacher, rows, step)
        return Terms(read.terms | terms.terms, read.metrics | terms.metrics)

    def evaluate(self, nets: Nets, batch: Batch, step: Step) -> Terms:
        """Give the stage's own terms, and every measure that can be taken, at the gates' likeliest choices."""
        rows = kept_rows(batch["labels"], weights_of(batch))
        teacher = nets["teacher"](batch, rows) if "teacher" in nets else None
        measures = measures_for(None if teacher is None else type(teacher))
        student, terms = self._run(nets["student"], batch, rows, {})
        read = self.compare(student, teacher, rows, step, measures)
        if self.stage == "whole":
            return Terms(read.terms | terms.terms, read.metrics | terms.metrics)
        beside = self._beside(nets, batch)
        return Terms(beside.terms, {**read.metrics, "share": terms.metrics["share"], **beside.metrics})

    def stepped(self, step: Step, means: dict[str, Tensor]) -> None:
        self.mean = means["share"].to(self.mean) if "share" in means else self.mean

    def state_dict(self) -> dict[str, Tensor]:
        return {"mean": self.mean}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.mean = state["mean"]

    def _beside(self, nets: Nets, batch: Batch) -> Terms:
        """Sum the error of the learners, or of the gates, on what the teacher's layers are given and give."""
        layers, dense, rows = adaptive(nets["student"].module), dense_model(nets["teacher"]), real_rows(batch)
        with passed(dense, list(layers)) as seen:
            nets["teacher"](batch, kept_rows(batch["labels"]))
        home = batch["input_ids"].device
        values, metrics = [], []
        for path, layer in layers.items():
            x, y = (rows.select(part.to(home)) for part in seen[path])
            x = x.to(layer.up_proj.weight.dtype)  # a teacher may be stored in less
            if self.stage == "learners":
                errors = (widen(layer.sums(x)) - widen(y)[:, None]).square().mean(-1)
                values.append(errors.mean(1))
                metrics.append(errors.detach())
            else:
                label = worthwhile(layer, x, y, self.tau)
                values.append(nn.functional.cross_entropy(widen(layer.choice(x)), label, reduction="none"))
                metrics.append(label[:, None] / layer.learners)
        value, shown = rows.sum(torch.stack(values).mean(0)), torch.stack(metrics).mean(0)
        if self.stage == "gates":
            named = {"label_share": (rows.sum(shown[:, 0]), "positions")}
        else:
            named = {f"error_{n + 1}": (rows.sum(shown[:, n]), "positions") for n in range(shown.shape[1])}
        return Terms({self.stage: Term(value, "positions")}, {self.stage: (value.detach(), "positions")} | named)

    def _run(self, student: Any, batch: Batch, kept: Rows, noise: Mapping[str, Tensor]) -> tuple[Any, Terms]:
        """Run the student, and return its signal with the terms of what its gates have chosen."""
        layers, rows = adaptive(student.module), real_rows(batch)
        gates = [f"{path}.choice" for path in layers]
        with noisy(student.module, noise), recorded(student.module, gates) as logits:
            signal = student(batch, kept)
        each = widen(torch.stack([rows.select(logits[gate]) for gate in gates]))
        choices, soft = chosen(each, None), each.softmax(-1)
        share = next(iter(layers.values())).used(choices).mean((0, 2))
        number, lengths = rows.select(sequence_of(batch)), lengths_of(batch, rows)
        there = lengths.clamp(min=1)
        histogram = soft.new_zeros(len(soft), len(lengths), soft.shape[-1]).index_add_(1, number, soft) / there[:, None]
        entropy = torch.special.entr(histogram.clamp(min=1e-9)).sum(-1).mean(0) / torch.tensor(soft.shape[-1]).log()
        mean = self.mean.to(share)
        apart = (share.new_zeros(len(lengths)).index_add_(0, number, share) / there - mean).abs().nan_to_num()
        sign = torch.sign(mean - self.budget).nan_to_num() if self.budget < 1 else torch.zeros_like(mean)
        some = lengths > 0
        return signal, Terms(
            {
                "cost": Term(rows.sum(sign * (share - self.budget)), "positions", self.budget_weight),
                "alike": Term(over_sequences(-entropy * some, batch), "sequences", self.entropy_weight),
                "even": Term(over_sequences(-apart * some, batch), "sequences", self.diversity_weight),
            },
            {"share": (rows.sum(share).detach(), "positions")},
        )


class ACMSection(TokenOptions):
    """Train a student of adaptive layers: its learners, its gates, or all of it within a budget of computation."""

    method: ClassVar = ACM
    name: Literal["acm"] = "acm"
    stage: Stage = "whole"
    """`learners` (errors to the teacher's layers, for every number of them), then `gates`, then `whole`."""
    tau: float = Field(0.7, gt=0)
    """Of `gates`: a token uses no more learners once one of them leaves this share of the error of those before it."""
    budget: float = Field(0.5, gt=0, le=1)
    """Of `whole`: share of the learners that a token should use in mean; 1 bounds nothing."""
    budget_weight: float = Field(0.1, ge=0)
    """Weight of the distance between the mean share and the budget."""
    entropy_weight: float = Field(0.05, ge=0)
    """Weight of the entropy of a sequence's choices, which is raised."""
    diversity_weight: float = Field(0.05, ge=0)
    """Weight of how far the shares of sequences lie from their mean, which is raised."""
