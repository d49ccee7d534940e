"""Dataset distillation by matching trajectories: a few steps on the set lead where experts came by many on the data."""

from collections.abc import Iterable
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor
from torch.nn.functional import cross_entropy

from kdlm.data import TensorRows
from kdlm.diffusion import Draws
from kdlm.losses import IGNORE_INDEX
from kdlm.methods.dataset.experts import Experts
from kdlm.methods.dataset.method import DatasetMethod, DatasetOptions, networks_for, seed_of, synthetic_of
from kdlm.methods.dataset.networks import Vectors
from kdlm.methods.method import Batch, Nets, Preparation, Step, Term, Terms, rows_in
from kdlm.models.synthetic import SyntheticImages


class TrajectoryMatching(DatasetMethod):
    """Networks that start where an expert was, and train on the set, end where the expert went.

    MTT (Cazenavette et al. 2022, arXiv 2203.11932): `|w_N - w*_(t+M)|^2 / |w*_t - w*_(t+M)|^2`, where w_N is N steps
    of SGD on the set from w*_t, with the set's own learned step size, and M epochs of the expert lie between. With
    flat experts and an average of the set it is FTD (arXiv 2211.11004). A row of the data is an expert.

    Args:
        experts: how they train.
        inner_steps: N. The graph of all of them is kept: memory grows with it.
        expert_epochs: M.
        max_start: t is drawn below it.
        inner_batch_size: images of the set that an inner step sees; None takes all.
        **options: of `DatasetMethod`.
    """

    paper = "arXiv 2203.11932"
    computes = ("matching",)
    paced_by = "samples"

    def __init__(
        self,
        *,
        experts: Experts,
        inner_steps: int,
        expert_epochs: int,
        max_start: int,
        inner_batch_size: int | None = None,
        **options: Any,
    ):
        super().__init__(**options)
        self.experts, self.inner_steps, self.inner_batch_size = experts, inner_steps, inner_batch_size
        self.expert_epochs, self.max_start = expert_epochs, max_start

    def prepare(self, context: Preparation) -> TensorRows:
        """Train the experts on all labelled rows, which are held in memory, and return a row for each."""
        synthetic = synthetic_of(context.nets)
        synthetic.learning_rate  # noqa: B018  raises where there is none
        real = context.batch(range(len(context.rows)))
        known = real["labels"] != IGNORE_INDEX
        networks, epochs = networks_for(self.network, synthetic), self.max_start + self.expert_epochs
        images, labels = real["pixel_values"][known], real["labels"][known]
        ways = self.experts.trained(networks, images, labels, epochs, self.augmentation, context.seed)
        return TensorRows({"weights": ways, "index": torch.arange(len(ways))})

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Count experts as samples, and images where evaluation sees them."""
        count = rows_in(batch)
        return {"samples" if "weights" in batch else "images": count}

    def losses(self, nets: Nets, batch: Batch, active: frozenset[str], step: Step) -> Terms:
        synthetic = synthetic_of(nets)
        networks = networks_for(self.network, synthetic)
        starts = Draws(batch["index"].cpu(), step.seed, step.index).integer("start", self.max_start)
        distances = []
        for way, start in zip(batch["weights"], starts.tolist(), strict=True):
            begin, goal = way[start], way[start + self.expert_epochs]
            batches = self.inner_batches(synthetic, step)
            end = unrolled(networks, begin, batches, synthetic.learning_rate)
            distances.append((end - goal).square().sum() / (begin - goal).square().sum())
        rate = synthetic.learning_rate.detach() * len(distances)
        return Terms({"matching": Term(torch.stack(distances).sum(), "samples")}, {"inner_rate": (rate, "samples")})

    def inner_batches(self, synthetic: SyntheticImages, step: Step) -> Iterable[tuple[Tensor, Tensor]]:
        """Yield what each inner step trains on: the set, or a part of it, in the order of its own shuffled passes."""
        images, targets, seed = synthetic.pixel_values, synthetic.targets, seed_of(step, "inner")
        size = min(self.inner_batch_size or len(images), len(images))
        chance, left = torch.Generator().manual_seed(seed), torch.empty(0, dtype=torch.int64)
        for number in range(self.inner_steps):
            chosen = torch.arange(size)
            if size < len(images):
                while len(left) < size:
                    left = torch.cat([left, torch.randperm(len(images), generator=chance)])
                chosen, left = left[:size], left[size:]
            yield self.augmentation(images[chosen], seed + number), targets[chosen]


def unrolled(
    networks: Vectors,
    start: Float[Tensor, "size"],
    batches: Iterable[tuple[Tensor, Tensor]],
    learning_rate: Float[Tensor, ""],
) -> Float[Tensor, "size"]:
    """Return where SGD leads from `start`, a step for each batch, in the graph of the batches and the learning rate."""
    weights = start.detach().requires_grad_()
    with torch.enable_grad():
        for images, targets in batches:
            loss = cross_entropy(networks.logits(weights, images), targets)
            (slope,) = torch.autograd.grad(loss, weights, create_graph=True)
            weights = weights - learning_rate * slope
    return weights


class TrajectoryOptions(DatasetOptions):
    """What MTT and FTD can be asked."""

    method: ClassVar = TrajectoryMatching
    experts: Experts = Experts()
    """How the experts train, before the first step."""
    inner_steps: int = Field(30, ge=1)
    """Steps N on the set that are to lead as far as the expert came; memory grows with them."""
    expert_epochs: int = Field(2, ge=1)
    """Epochs M of the expert between start and goal."""
    max_start: int = Field(20, ge=1)
    """Starts are drawn from as many first epochs of the expert, who trains for this and `expert_epochs` together."""
    inner_batch_size: int | None = Field(None, ge=1)
    """Images of the set that a step sees; by default all of them."""


class MTTSection(TrajectoryOptions):
    """A few steps on the set lead where experts came by epochs on the data; the step size is learned with it."""

    name: Literal["mtt"] = "mtt"


class FTDSection(TrajectoryOptions):
    """Trajectory matching with experts trained to stay flat (adaptive GSAM); the average of the set is evaluated."""

    paper: ClassVar = "arXiv 2211.11004"
    name: Literal["ftd"] = "ftd"
    experts: Experts = Experts(rho=0.01, alpha=0.4)
    """How the experts train; FTD's own `rho` and `alpha` to begin with."""
    ema: float | None = Field(0.9995, gt=0, lt=1)
    """Decay of the average of the set, per step; the average is then what is evaluated and exported."""
