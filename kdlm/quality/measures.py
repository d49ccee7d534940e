"""The figures that a run logs about a set of samples."""

from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kdlm.losses.mmd import mmd2, polynomial
from kdlm.quality.frechet import frechet_distance
from kdlm.quality.manifold import precision_recall
from kdlm.quality.sets import as_rows

BATCH = 256  # samples that the feature network sees at once


@runtime_checkable
class FeatureNet(Protocol):
    """A frozen classifier that also shows what it saw: samples -> (features [n, width], logits [n, classes])."""

    def __call__(
        self, samples: Float[Tensor, "n *shape"], /
    ) -> tuple[Float[Tensor, "n width"], Float[Tensor, "n classes"]]: ...


@torch.no_grad()
def quality_of(
    samples: Float[Tensor, "n *shape"],
    reference: Float[Tensor, "n *shape"],
    *,
    features: FeatureNet | None = None,
    labels: Int[Tensor, "n"] | None = None,
) -> dict[str, float]:
    """Return the figures of a set of samples beside as many real ones, by the names that logs use.

    - `fd_pixel`: Frechet distance of the raw values (pixels, coordinates).
    - `fd`: that of the features; only with `features`.
    - `precision`, `recall`, `mmd` (MMD^2 with KID's polynomial kernel): of the features, else of the raw values.
    - `accuracy`: share of the samples that the network takes for what they were to be; only with `labels`.

    `features` is a network in evaluation mode, seen without a graph and 256 samples at a time. `labels` are the classes
    the samples were made for, in their order.

    Raises ValueError for values that are not finite, for sets of unequal shapes (every figure here moves with n, so
    only those of equal n can be compared) or of fewer than four samples, and for `labels` without `features`.
    """
    if samples.shape != reference.shape:
        raise ValueError(
            "quality is measured on as many samples as references, of one shape: "
            f"got {list(samples.shape)} and {list(reference.shape)}"
        )
    raw = as_rows(samples, "samples", least=4), as_rows(reference, "reference", least=4)
    figures = {"fd_pixel": frechet_distance(*raw)}
    compared = raw
    if features is None:
        if labels is not None:
            raise ValueError("accuracy needs a classifier: give features=, or leave labels out")
    else:
        seen, logits = seen_by(features, samples)
        compared = seen.double(), seen_by(features, reference)[0].double()
        figures["fd"] = frechet_distance(*compared)
        if labels is not None:
            figures["accuracy"] = accuracy_of(logits, labels)
    manifold = precision_recall(*compared)
    figures |= {"precision": manifold.precision, "recall": manifold.recall}
    return figures | {"mmd": mmd2(*compared, polynomial).item()}


@torch.no_grad()
def seen_by(
    net: FeatureNet, samples: Float[Tensor, "n *shape"]
) -> tuple[Float[Tensor, "n width"], Float[Tensor, "n classes"]]:
    """Return the features and logits of all samples, 256 at a time and without a graph."""
    parts = [net(part) for part in samples.split(BATCH)]
    return torch.cat([features for features, _ in parts]), torch.cat([logits for _, logits in parts])


def accuracy_of(logits: Float[Tensor, "n classes"], labels: Int[Tensor, "n"]) -> float:
    """Return the share of rows whose largest logit is the intended label's. Raises ValueError for unequal lengths."""
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or len(labels) == 0:
        raise ValueError(f"expected one label a row of logits, got {list(labels.shape)} for {list(logits.shape)}")
    return (logits.argmax(-1) == labels.to(logits.device)).double().mean().item()
