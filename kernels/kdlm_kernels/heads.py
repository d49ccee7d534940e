"""Heads: what turns a hidden state into logits, whole or in pieces on several devices."""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class HeadLike(Protocol):
    """What any head must show: kdlm's, transformers' or your own."""

    @property
    def weight(self) -> Tensor: ...
    @property
    def bias(self) -> Tensor | None: ...
    @property
    def logit_scale(self) -> float: ...
    @property
    def softcap(self) -> float | None: ...


class Head(NamedTuple):
    """The projection to the vocabulary, and what the model does to the product.

    Attributes:
        weight: `[vocab, hidden]`.
        bias: `[vocab]`, added to the product.
        logit_scale: factor on the logits, after the bias.
        softcap: `cap * tanh(logits / cap)`, after the factor.
    """

    weight: Tensor
    bias: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None


class Shape(NamedTuple):
    """What a head does after its product."""

    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, raw: Tensor) -> Tensor:
        """Return the logits of a product, which is not changed."""
        logits = raw if self.scale == 1.0 else raw * self.scale
        return logits if self.softcap is None else torch.tanh(logits / self.softcap).mul_(self.softcap)

    def chain(self, grad: Tensor, logits: Tensor) -> Tensor:
        """Turn a gradient to the logits into one to the product, in place."""
        if self.softcap is not None:
            grad.mul_(1 - (logits / self.softcap).square())
        return grad if self.scale == 1.0 else grad.mul_(self.scale)


def as_head(head: "HeadLike | Tensor | None") -> Head | None:
    """Return a bare weight or anything like a head as a `Head`; None stays None (the input is logits already)."""
    if head is None or isinstance(head, Head):
        return head
    if isinstance(head, Tensor):
        return Head(head)
    return Head(head.weight, head.bias, head.logit_scale, head.softcap)


def shape_of(head: Head | None) -> Shape:
    """Return what the head does after its product."""
    return Shape() if head is None else Shape(head.logit_scale, head.softcap)
