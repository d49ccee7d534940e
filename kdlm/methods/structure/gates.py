"""Gates of adaptive layers: how many learners would do, how a choice is drawn, and what is counted of the choices."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kdlm.diffusion import Draws
from kdlm.losses.distributions import widen
from kdlm.methods.method import Batch, Step
from kdlm.models import adaptive_layers
from kdlm.signal import Rows, sequence_of


def adaptive(model: Any) -> dict[str, Any]:
    """Return the adaptive layers of a student by their paths. Raises ValueError where it has none."""
    if not (layers := adaptive_layers(model)):
        raise ValueError("method: acm trains a student with adaptive layers: student: {name: adaptive, source: ...}")
    return layers


@torch.no_grad()
def worthwhile(layer: Any, x: Float[Tensor, "rows hidden"], y: Tensor, tau: float) -> Int[Tensor, "rows"]:
    """Return the smallest n >= 2 with d(n) / d(n - 1) >= tau, d the distance of h(x, n) to y; else all learners."""
    distance = (widen(layer.sums(x)) - widen(y)[:, None]).norm(dim=-1)
    enough = distance[:, 1:] >= tau * distance[:, :-1]
    return torch.where(enough.any(1), enough.int().argmax(1) + 2, layer.learners)


def gumbel(layers: Mapping[str, Any], batch: Batch, step: Step) -> dict[str, Float[Tensor, "batch length choices"]]:
    """Return noise for every gate: a token's is given by step, layer, its id and its place, however a batch is cut."""
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    place = batch["position_ids"] if mask is None and "position_ids" in batch else None
    if place is None:
        place = torch.arange(ids.shape[1], device=ids.device).expand_as(ids) if mask is None else mask.cumsum(1) - 1
    draws = Draws((ids + (place.clamp(min=0) << 32)).flatten(), step.seed, step.index)
    uniform = {path: draws.uniform(f"gate {path}", (layer.learners + 1,)) for path, layer in layers.items()}
    return {path: -(-u.log()).log().view(*ids.shape, -1) for path, u in uniform.items()}


def lengths_of(batch: Batch, rows: Rows) -> Int[Tensor, "sequences"]:
    """Return how many real tokens each sequence has."""
    number = sequence_of(batch)
    most = len(batch["weight"]) if "weight" in batch else number.numel()
    return torch.zeros(most, dtype=torch.long, device=number.device).index_add_(
        0, rows.select(number), torch.ones_like(rows.index)
    )
