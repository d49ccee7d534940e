"""Attention transfer: where a network looks, as a map of the energy of its channels (ICLR 2017, arXiv 1612.03928)."""

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, normalize

from kdlm.losses.distributions import widen


def attention_transfer(
    student: Float[Tensor, "rows channels height width"], teacher: Float[Tensor, "rows others tall wide"]
) -> Float[Tensor, "rows"]:
    """Return the mean squared difference of the rows' attention maps (its weight in the released code: 1000).

    A map is the mean over channels of the squared features, divided by its own L2 norm; so the number of channels may
    differ, and the scale of either side is inert. Of two sizes the larger map is averaged down to the smaller before it
    is normalised. The mean over the rows is the released code's value; the paper has norms of differences in its place.
    The teacher carries no gradient.
    """
    ours, theirs = _energy(widen(student)), _energy(widen(teacher.detach()))
    size = min(ours.shape[1], theirs.shape[1]), min(ours.shape[2], theirs.shape[2])
    found, wanted = (normalize(adaptive_avg_pool2d(x, size).flatten(1)) for x in (ours, theirs))
    return (found - wanted.to(found)).square().mean(-1)


def _energy(x: Float[Tensor, "rows channels height width"]) -> Float[Tensor, "rows height width"]:
    return x.square().mean(1)
