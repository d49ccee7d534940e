"""What evaluation makes of a denoiser: samples of it beside the teacher's and beside data."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from kdlm.quality.measures import quality_of
from kdlm.quality.modes import mode_report
from kdlm.quality.pictures import Picture, scatter, side_by_side
from kdlm.section import Custom, Section

NAMED = ("sandbox:digits-classifier", "sandbox:ring")
CLOSED = ("fd", "fd_pixel")
"""Figures of which it is said how much of the way from start to teacher the student has gone."""


class SamplingSection(Section):
    """How evaluation samples, and what it measures of the samples."""

    count: int = Field(1024, ge=4)
    """Samples of an evaluation; they are compared with as many of the training rows."""
    features: str | None = None
    """What knows more of a sample than its values: `sandbox:digits-classifier`, `sandbox:ring` (its modes), or a
    function of your own as `module:attribute`, called without arguments, that returns a network: samples -> (features,
    logits)."""
    teacher_steps: int = Field(16, ge=1)
    """Steps in which the teacher samples, along its probability flow."""
    lowest: float = Field(0.02, gt=0)
    """Ratio of noise to signal at which the teacher's last step begins."""
    highest: float = Field(80.0, gt=0)
    """Ratio of noise to signal at which its first step begins."""
    guidance: float = Field(0.0, ge=0)
    """Scale w of the teacher's guidance, `c + w (c - 0)`."""
    shown: int = Field(24, ge=1)
    """Samples in a picture."""


@dataclass
class Yardstick:
    """Measures samples against data, and draws them.

    Attributes:
        reference: as many real samples as are measured.
        labels: what the samples are made to be; None where nothing is said.
        features: of `SamplingSection`.
        ends: figures of the student's start and of the teacher, between which the student stands; filled by whoever
            can sample them.
    """

    reference: Float[Tensor, "n *shape"]
    labels: Int[Tensor, "n"] | None
    features: str | None = None
    ends: dict[str, dict[str, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._net: Any = None
        if self.features == "sandbox:digits-classifier":
            from kdlm.sandbox.digits_classifier import digits_classifier

            self._net = digits_classifier()
        elif self.features is not None and self.features not in NAMED:
            self._net = Custom(target=self.features).load()()

    def figures(self, samples: Float[Tensor, "n *shape"]) -> dict[str, float]:
        """Return what `quality_of` measures; of the ring also `good`, `modes` and `tv`.

        With both ends known there is `gap_fd` and `gap_fd_pixel`: (start - student) / (start - teacher).
        """
        labels = self.labels if self._net is not None else None
        found = quality_of(samples.float().cpu(), self.reference, features=self._net, labels=labels)
        if self.features == "sandbox:ring":
            found |= _modes(samples)
        for name in CLOSED:
            if name in found and {"start", "teacher"} <= self.ends.keys():
                start, teacher = (self.ends[end][name] for end in ("start", "teacher"))
                found[f"gap_{name}"] = (start - found[name]) / (start - teacher)
        return found

    def picture(self, sets: Mapping[str, Float[Tensor, "n *shape"]], shown: int) -> Picture | None:
        """Return the first samples of each set side by side, or the last set's points on data; None of other shapes."""
        last = sets[next(reversed(list(sets)))]
        if self.reference.dim() == 2 and self.reference.shape[1] == 2:
            return scatter(last.cpu(), self.reference)
        if self.reference.dim() == 4 and self.reference.shape[1] in (1, 3):
            return side_by_side({name: part[:shown].cpu() for name, part in sets.items()})
        return None


def _modes(points: Tensor) -> dict[str, float]:
    from kdlm.sandbox.ring import SHARES, STD, centres

    report = mode_report(points.float().cpu(), centres(), STD, torch.tensor(SHARES))
    return {"good": report.good, "modes": float(report.modes), "tv": report.tv}


def yardstick(section: SamplingSection, rows: Any, clean_of: Callable[[Any], Tensor], *, seed: int = 0) -> Yardstick:
    """Return a yardstick of as many training rows as the section samples, drawn at random.

    Raises ValueError when there are fewer rows.
    """
    if len(rows) < section.count:
        raise ValueError(f"sampling.count: {section.count} samples want as many rows to compare with, got {len(rows)}")
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[: section.count]
    chosen = [rows[int(place)] for place in order]
    reference = torch.stack([torch.as_tensor(clean_of(row)) for row in chosen]).float()
    labels = torch.stack([torch.as_tensor(row["labels"]) for row in chosen]) if "labels" in chosen[0] else None
    return Yardstick(reference, labels, section.features)
