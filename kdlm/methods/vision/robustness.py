"""Robustness: what evaluation of an image method asks about changed images."""

from collections.abc import Callable
from typing import Any

from pydantic import Field
from torch import Tensor

from kdlm.quality import carlini_wagner, fgsm
from kdlm.section import Section


class Attacks(Section):
    """Attacks on the student in evaluation. A defence that FGSM fails against and Carlini-Wagner does not is none."""

    epsilon: float = Field(0.1, gt=0)
    """Step of FGSM, in the values that the network sees."""
    low: float = -1.0
    """The least value of an image, as the network sees it."""
    high: float = 1.0
    """The greatest."""
    cw_steps: int = Field(50, ge=0)
    """Steps of each round of Carlini and Wagner's attack; 0 leaves it out."""
    cw_searches: int = Field(5, ge=1)
    """Rounds, each with another weight of misleading against staying near."""

    def sums(self, classifier: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return sums over images: right after FGSM, right after Carlini-Wagner, and how far that had to go (L2)."""
        bounds: dict[str, Any] = {"low": self.low, "high": self.high}
        changed = {"fgsm_accuracy": fgsm(classifier, images, labels, epsilon=self.epsilon, **bounds)}
        if self.cw_steps:
            options: dict[str, Any] = {"steps": self.cw_steps, "searches": self.cw_searches}
            changed["cw_accuracy"] = carlini_wagner(classifier, images, labels, **options, **bounds)
        found = {name: (classifier(moved).argmax(-1) == labels).float().sum() for name, moved in changed.items()}
        if self.cw_steps:
            found["cw_distance"] = (changed["cw_accuracy"] - images).flatten(1).norm(dim=1).sum()
        return found
