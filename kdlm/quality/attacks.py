"""Attacks: changes of an image, too small to see, that are to change the class that a classifier sees.

Both ask the classifier for gradients with respect to the image, and so believe what these say. A classifier whose
gradients vanish (defensive distillation) defeats the first and not the second, which descends on logits.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy

Images = Float[Tensor, "n channels height width"]
Labels = Int[Tensor, "n"]
Logits = Callable[[Tensor], Tensor]


def fgsm(classifier: Logits, images: Images, labels: Labels, *, epsilon: float, low: float, high: float) -> Images:
    """Return the images moved by `epsilon` along the sign of the cross-entropy's gradient (arXiv 1412.6572).

    Kept in [low, high]. Where the gradient is exactly 0, an image stays as it is.
    """
    with torch.enable_grad():
        moved = images.detach().clone().requires_grad_()
        loss = cross_entropy(classifier(moved).float(), labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, moved)
    return (images + epsilon * gradient.sign()).clamp(low, high)


def carlini_wagner(
    classifier: Logits,
    images: Images,
    labels: Labels,
    *,
    low: float,
    high: float,
    steps: int = 50,
    searches: int = 5,
    rate: float = 0.05,
    cost: float = 1e-2,
    target: Labels | None = None,
) -> Images:
    """Return the nearest images found that are taken for another class (for `target`, where given); L2 of Carlini and
    Wagner (S&P 2017, arXiv 1608.04644).

    Minimises `|x' - x|^2 + c max(z_y - max_{j != y} z_j, 0)` on logits z by Adam, over w with x' = tanh(w) in
    [low, high]; c starts at `cost` and for each image goes up tenfold until something is found, then is bisected,
    `searches` rounds in all. Where nothing is found, an image stays as it is.
    """
    middle, half = (high + low) / 2, (high - low) / 2
    start = ((images - middle) / half).clamp(-1 + 1e-6, 1 - 1e-6).atanh()
    best, nearest = images.clone(), torch.full((len(images),), torch.inf, device=images.device)
    lower, upper = torch.zeros_like(nearest), torch.full_like(nearest, torch.inf)
    factor = torch.full_like(nearest, cost)
    for _ in range(searches):
        found = torch.zeros_like(nearest, dtype=torch.bool)
        with torch.enable_grad():
            w = start.clone().requires_grad_()
            optimizer = torch.optim.Adam([w], lr=rate)
            for _ in range(steps):
                moved = w.tanh() * half + middle
                distance = (moved - images).square().flatten(1).sum(1)
                margin = _margin(classifier(moved).float(), labels, target)
                fooled = margin < 0
                better = fooled & (distance < nearest)
                best = torch.where(better.view(-1, 1, 1, 1), moved.detach(), best)
                nearest = torch.where(better, distance.detach(), nearest)
                found |= fooled
                (w.grad,) = torch.autograd.grad((distance + factor * margin.clamp(min=0)).sum(), w)
                optimizer.step()
        upper = torch.where(found, factor, upper)
        lower = torch.where(found, lower, factor)
        factor = torch.where(upper.isinf(), factor * 10, (lower + upper) / 2)
    return best


def _margin(logits: Float[Tensor, "n classes"], labels: Labels, target: Labels | None) -> Float[Tensor, "n"]:
    """Return by how much the attack has not succeeded yet, in logits."""
    goal = labels if target is None else target
    own = logits.gather(-1, goal[:, None]).squeeze(-1)
    others = logits.scatter(-1, goal[:, None], -torch.inf).amax(-1)
    return own - others if target is None else others - own
