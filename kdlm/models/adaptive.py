"""Adaptive computation: a feed-forward layer as learners that a gate uses as many of as a token needs (2312.10193)."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kdlm.features import module_at


class AdaptiveMLP(nn.Module):
    """A gated feed-forward layer whose neurons are `learners` groups, the first k of which compute: h(z, k).

    Its neurons keep their names, so that a folder opens without kdlm as the layer with all its learners. A gate that
    has not learnt chooses all of them. Where gradients are taken, the choice is one-hot forwards and a softmax
    backwards (straight through), and all learners are run and masked; where they are not, each learner runs on the
    tokens alone that use it.

    Args:
        mlp: `gate_proj`, `up_proj`, `down_proj`, an activation; its neurons are ordered by strength here, in place.
        learners: groups of neurons.
        width: hidden units of the gate.
    """

    def __init__(self, mlp: Any, learners: int, width: int):
        super().__init__()
        neurons, hidden = mlp.up_proj.weight.shape
        if neurons % learners:
            raise ValueError(f"student.learners: {neurons} neurons are not divided by {learners}")
        self.learners = learners
        self.gate_proj, self.up_proj, self.down_proj, self.act_fn = (
            mlp.gate_proj,
            mlp.up_proj,
            mlp.down_proj,
            mlp.act_fn,
        )
        factory = {"device": mlp.up_proj.weight.device, "dtype": mlp.up_proj.weight.dtype}
        first, last = nn.Linear(hidden, width, **factory), nn.Linear(width, learners + 1, **factory)
        with torch.no_grad():
            last.weight.zero_()
            last.bias.zero_()[-1] = 1
        self.choice = nn.Sequential(first, nn.GELU(), last)
        self.noise: Tensor | None = None

    @torch.no_grad()
    def order(self) -> None:
        """Put the strongest neurons first, by the product of what comes in and goes out; the sum is as it was."""
        order = (self.down_proj.weight.float().norm(dim=0) * self.up_proj.weight.float().norm(dim=1)).argsort().flip(0)
        for layer in (self.gate_proj, self.up_proj):
            for parameter in layer.parameters():
                parameter.copy_(parameter[order])
        self.down_proj.weight.copy_(self.down_proj.weight[:, order])

    def forward(self, x: Float[Tensor, "*tokens hidden"]) -> Float[Tensor, "*tokens hidden"]:
        logits = self.choice(x)
        if not torch.is_grad_enabled():
            return self._grouped(x.flatten(0, -2), logits.argmax(-1).flatten()).view_as(x)
        used = self.used(chosen(logits, self.noise))
        neurons = self._neurons(x).unflatten(-1, (self.learners, -1)) * used[..., None]
        return self.down_proj(neurons.flatten(-2))

    def sums(self, x: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "tokens learners hidden"]:
        """Return h(x, 1) ... h(x, learners)."""
        neurons = self._neurons(x).unflatten(-1, (self.learners, -1))
        parts = torch.einsum("tnm,hnm->tnh", neurons, self.down_proj.weight.unflatten(1, (self.learners, -1)))
        bias = 0 if self.down_proj.bias is None else self.down_proj.bias
        return parts.cumsum(1) + bias

    @staticmethod
    def used(choice: Float[Tensor, "*tokens choices"]) -> Float[Tensor, "*tokens learners"]:
        """Return whether each learner is among the first k, of one-hot choices of k = 0 ... learners."""
        return choice.flip(-1).cumsum(-1).flip(-1)[..., 1:]

    def _neurons(self, x: Tensor) -> Tensor:
        return self.act_fn(self.gate_proj(x)) * self.up_proj(x)

    def _grouped(self, x: Float[Tensor, "tokens hidden"], k: Tensor) -> Float[Tensor, "tokens hidden"]:
        """Run each learner on the tokens that use it: they are sorted, so that it is the first so many of them."""
        order = k.argsort(descending=True)
        counts = (k[:, None] >= torch.arange(1, self.learners + 1, device=k.device)).sum(0).tolist()
        sorted_x, size = x[order], self.up_proj.weight.shape[0] // self.learners
        y = torch.zeros_like(sorted_x)
        if self.down_proj.bias is not None:
            y = y + self.down_proj.bias
        for n, count in enumerate(counts):
            if count:
                at, some = slice(n * size, (n + 1) * size), sorted_x[:count]
                gate, up = (_rows(layer, some, at) for layer in (self.gate_proj, self.up_proj))
                y[:count] += nn.functional.linear(self.act_fn(gate) * up, self.down_proj.weight[:, at])
        return torch.empty_like(y).index_copy_(0, order, y)


def _rows(layer: Any, x: Tensor, at: slice) -> Tensor:
    return nn.functional.linear(x, layer.weight[at], None if layer.bias is None else layer.bias[at])


def chosen(logits: Float[Tensor, "*tokens choices"], noise: Tensor | None) -> Float[Tensor, "*tokens choices"]:
    """Return the choice one-hot, with the gradient of a softmax; `noise` of a Gumbel law draws it (1611.01144)."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    soft = (wide if noise is None else wide + noise).softmax(-1)
    hard = torch.zeros_like(soft).scatter_(-1, soft.argmax(-1, keepdim=True), 1.0)
    return (hard + (soft - soft.detach())).to(logits.dtype)  # exactly one-hot


@contextmanager
def noisy(model: nn.Module, noise: Mapping[str, Tensor]) -> Iterator[None]:
    """Let the gates at these paths draw their choices by this noise `[batch, length, choices]` in the context."""
    with ExitStack() as stack:
        for path, value in noise.items():
            module: Any = module_at(model, path)
            module.noise = value
            stack.callback(setattr, module, "noise", None)
        yield


def adaptive_layers(model: nn.Module) -> dict[str, AdaptiveMLP]:
    """Return the adaptive layers of a model by their paths."""
    return {path: module for path, module in model.named_modules() if isinstance(module, AdaptiveMLP)}


def refuse_parts(model: nn.Module, key: str) -> None:
    """Raise ValueError for a model with adaptive layers: what goes onto whole layers does not reach the learners."""
    if adaptive_layers(model):
        raise ValueError(f"student.{key}: the layers are adaptive, and learners are parts of weights: leave it out")
