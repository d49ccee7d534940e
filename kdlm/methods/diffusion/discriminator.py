"""A discriminator: small heads on the features of a denoiser, asked at noised samples (a "diffusion GAN")."""

import itertools
from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from kdlm.diffusion import AnyTimes, Condition, Level
from kdlm.methods.diffusion.pull import mean_of
from kdlm.methods.method import Nets
from kdlm.section import Section

Logits = list[Float[Tensor, "batch places"]]


class Discriminator(Section):
    """Heads on middle features of the fake network (DMD2, arXiv 2405.14867) or of the teacher (LADD, arXiv 2403.12015).

    What a sample is of, and its noise level, the features know. High logits mean data.
    """

    layers: list[str] = Field(min_length=1)
    """Dotted paths of the modules whose outputs it reads, e.g. `blocks.1`; of an output in parts the first."""
    of: Literal["fake", "teacher"] = "fake"
    """Whose features they are. Those of the fake network learn to tell apart too, as in DMD2's own code; the teacher's
    stay as they are."""
    loss: Literal["softplus", "hinge"] = "softplus"
    """Softplus is the logistic loss, for the student in its non-saturating form."""
    weight: float = Field(3e-3, gt=0)
    """Of the student's loss to it."""
    own_weight: float = Field(1e-2, gt=0)
    """Of its own loss."""
    width: int = Field(64, ge=1)
    """Of the hidden layer of each head."""
    times: AnyTimes | None = None
    """Noise levels at which it looks; by default the method's."""
    r1: float = Field(0.0, ge=0)
    """Weight, beside its own loss, of its steepness at data, by differences in place of R1's gradient."""
    learning_rate: float | None = Field(None, gt=0)
    """Learning rate of the heads; by default the run's."""

    def heads(self, network: Any) -> "Heads":
        """Return untrained heads for the features of a network. Raises ValueError for a layer that it has not."""
        somewhere = next(itertools.chain(network.parameters(), network.buffers()))
        blank = torch.zeros(1, *network.shape, device=somewhere.device)
        level = Level(torch.ones(1, device=blank.device), torch.ones(1, device=blank.device))
        with torch.no_grad():
            _, features = network.with_features(blank, level, network.blank(), self.layers)
        widths = [places_of(features[layer]).shape[-1] for layer in self.layers]
        return Heads(widths, self.width).to(blank.device)

    def logits(self, nets: Nets, noised: Tensor, level: Level, condition: Condition | None) -> Logits:
        """Return what each head says at every place of its features, in the graph of whatever is live."""
        _, features = nets[self.of].with_features(noised, level, condition, self.layers)
        return nets["discriminator"]([features[layer] for layer in self.layers])

    def logit(self, nets: Nets, noised: Tensor, level: Level, condition: Condition | None) -> Float[Tensor, "batch"]:
        """Return the mean logit of each sample: an estimate of `log p / q`, of the data's law over the student's."""
        return _mean(self.logits(nets, noised, level, condition))

    def fooled(self, nets: Nets, noised: Tensor, level: Level, condition: Condition | None) -> Float[Tensor, "batch"]:
        """Return the student's loss at its own noised samples."""
        logits = self.logits(nets, noised, level, condition)
        return _mean([nn.functional.softplus(-k) if self.loss == "softplus" else -k for k in logits])

    def told_apart(
        self, nets: Nets, written: Tensor, real: Tensor, level: Level, condition: Condition | None
    ) -> Float[Tensor, "batch"]:
        """Return the discriminator's loss at noised samples of the student and of the data."""
        loss = nn.functional.softplus if self.loss == "softplus" else lambda k: nn.functional.relu(1 + k)
        low = _mean([loss(k) for k in self.logits(nets, written, level, condition)])
        return low + _mean([loss(-k) for k in self.logits(nets, real, level, condition)])

    def steepness(
        self, nets: Nets, real: Tensor, noise: Tensor, level: Level, condition: Condition | None
    ) -> Float[Tensor, "batch"]:
        """Return the mean square change of the logits when a tenth of `noise` is added (FastGen's form of R1)."""
        here, there = (self.logits(nets, at, level, condition) for at in (real, real + 0.1 * noise))
        return _mean([(a - b).square() for a, b in zip(here, there, strict=True)])


class Heads(nn.Module):
    """A head for each layer: normalisation over the width, then two linear maps, at every place.

    Args:
        widths: of the features.
        hidden: between the two maps.
    """

    def __init__(self, widths: Sequence[int], hidden: int):
        super().__init__()
        self.heads = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, 1))
            for width in widths
        )

    def forward(self, features: Sequence[Tensor]) -> Logits:
        """Return a logit for every sample and place, of each layer."""
        dtype = self.heads[0][1].weight.dtype
        return [
            head(places_of(feature).to(dtype)).squeeze(-1).float()
            for head, feature in zip(self.heads, features, strict=True)
        ]


def places_of(features: Tensor) -> Float[Tensor, "batch places width"]:
    """Return features as places: of a vector one, of a sequence `[batch, length, width]` its positions, of maps
    `[batch, channels, ...]` their pixels."""
    if features.dim() == 2:
        return features[:, None]
    return features if features.dim() == 3 else features.flatten(2).transpose(1, 2)


def _mean(values: Logits) -> Float[Tensor, "batch"]:
    """Mean over places, then over layers, so that large maps do not outvote small ones."""
    return torch.stack([mean_of(value) for value in values]).mean(0)
