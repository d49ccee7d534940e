"""The ratio of the data's law to the student's, as a discriminator knows it: reverse KL becomes any f-divergence."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

FDivergence = Literal[
    "reverse_kl", "forward_kl", "js", "softened_reverse_kl", "jeffreys", "squared_hellinger", "neyman"
]
WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "reverse_kl": torch.ones_like,  # f = -log r
    "forward_kl": lambda r: r,  # r log r
    "js": lambda r: r / (1 + r),  # r log r - (1 + r) log((1 + r) / 2)
    "softened_reverse_kl": lambda r: 1 / (1 + r),  # (1 + r) log((1 + r) / r)
    "jeffreys": lambda r: 1 + r,  # (r - 1) log r
    "squared_hellinger": lambda r: r.sqrt() / 4,  # 1 - sqrt r
    "neyman": lambda r: 2 / r,  # (1 - r)^2 / r
}
"""h(r) = f''(r) r^2 of each f-divergence `E_q f(p / q)` (arXiv 2502.15681, table 1); the factors are exact."""
assert set(WEIGHTS) == set(get_args(FDivergence))


@dataclass
class DensityRatio:
    """Weighs samples by h(r), r = p / q at the noised sample (f-distill, arXiv 2502.15681).

    A logit is read as log r within +-10; r is divided by its mean among the samples of like noise, and kept within
    0.1 to 20; h(r) is divided by its own mean. These means are running ones of the student's steps before, over all
    ranks, where the paper's code takes those of the batch at hand: weights then do not depend on how a step's batch is
    cut. They start where a discriminator that knows nothing puts them. Nothing here is in a graph.

    Attributes:
        divergence: which f.
        bins: of noise levels, equally likely ones.
        decay: of the running means, per step of the student; 0 takes the last step's.
    """

    divergence: FDivergence = "forward_kl"
    bins: int = 10
    decay: float = 0.9
    ratios: Float[Tensor, "bins"] = field(init=False)
    weight: Float[Tensor, ""] = field(init=False)

    def __post_init__(self) -> None:
        self.h = WEIGHTS[self.divergence]
        self.ratios = torch.ones(self.bins)
        self.weight = self.h(torch.ones(()))

    @property
    def follows(self) -> tuple[str, ...]:
        """Names of the means that `stepped` wants."""
        return (*(f"{what} {bin}" for bin in range(self.bins) for what in ("ratio", "share")), "h")

    @torch.no_grad()
    def __call__(
        self, logit: Float[Tensor, "batch"], place: Float[Tensor, "batch"]
    ) -> tuple[Float[Tensor, "batch"], dict[str, tuple[Tensor, str]]]:
        """Return the weight of each sample, and sums of what is followed.

        Args:
            logit: of the discriminator.
            place: the share of noise levels below the sample's, in [0, 1).
        """
        ratio = logit.float().clamp(-10, 10).exp()
        bins = (place * self.bins).long().clamp(max=self.bins - 1)
        evened = (ratio / self.ratios.to(ratio.device)[bins]).clamp(0.1, 20)
        h = self.h(evened)
        mine = torch.nn.functional.one_hot(bins, self.bins).to(ratio.dtype)
        sums = {f"ratio {k}": value for k, value in enumerate(ratio @ mine)}
        sums |= {f"share {k}": value for k, value in enumerate(mine.sum(0))}
        return h / self.weight.to(h.device), {name: (v, "samples") for name, v in {**sums, "h": h.sum()}.items()}

    def stepped(self, means: dict[str, Tensor]) -> None:
        """Move the running means by a step's; they stay where no sample fell, so too in steps without the student."""
        for k in range(self.bins):
            if means[f"share {k}"] > 0:
                self.ratios[k].lerp_((means[f"ratio {k}"] / means[f"share {k}"]).to(self.ratios), 1 - self.decay)
        if means["h"] > 0:
            self.weight = self.weight.lerp(means["h"].to(self.weight), 1 - self.decay)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the running means."""
        return {"ratios": self.ratios, "weight": self.weight}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take back what `state_dict` gave."""
        self.ratios, self.weight = state["ratios"].clone(), state["weight"].clone()
