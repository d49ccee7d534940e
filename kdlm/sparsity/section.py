"""What a recipe says about sparsity: how many weights go, which, and when."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from kdlm.section import Section


class OneShot(Section):
    """All at once, before the first step."""

    name: Literal["one_shot"] = "one_shot"

    def share_at(self, done: int, total: int, target: float) -> float:
        """Return the share of weights that is pruned after `done` of `total` optimiser steps, before the next."""
        return target


class Levels(Section):
    """One level after another, each trained for an equal part of the run (SquareHead, arXiv 2310.06927)."""

    name: Literal["levels"] = "levels"
    before: list[Annotated[float, Field(gt=0, lt=1)]] = Field(min_length=1)
    """Shares before the last one, which is the section's: [0.5, 0.65] on the way to 0.75."""

    def share_at(self, done: int, total: int, target: float) -> float:
        """Return the share of weights that is pruned after `done` of `total` optimiser steps, before the next."""
        levels = [*self.before, target]
        return levels[min(len(levels) * done // max(1, total), len(levels) - 1)]


class Cubic(Section):
    """Many weights at first and ever fewer, every few steps, then a rest with the last mask (arXiv 1710.01878, eq. 1,
    from a sparsity of 0)."""

    name: Literal["cubic"] = "cubic"
    start: float = Field(0.0, ge=0, lt=1)
    """Share of the run after which it begins."""
    end: float = Field(0.5, gt=0, lt=1)
    """Share of the run after which the last weights are gone; the rest of it heals the student."""
    every: int = Field(10, ge=1)
    """Optimiser steps between two prunings."""

    @model_validator(mode="after")
    def _has_a_length(self) -> "Cubic":
        if self.start >= self.end:
            raise ValueError(f"start: {self.start} is not before end: {self.end}")
        return self

    def share_at(self, done: int, total: int, target: float) -> float:
        """Return the share of weights that is pruned after `done` of `total` optimiser steps, before the next."""
        begin, end = int(self.start * total), int(self.end * total)
        if done < begin or done >= end:
            return 0.0 if done < begin else target
        pruned = (done - begin) // self.every * self.every
        return target * (1 - (1 - pruned / (end - begin)) ** 3)


AnySchedule = Annotated[OneShot | Levels | Cubic, Field(discriminator="name")]
"""When weights go, chosen by its `name`."""


class SparsitySection(Section):
    """Prune the student's linear layers, and hold what was pruned at zero in every step."""

    share: float | None = Field(None, gt=0, lt=1)
    """Share of the weights of these layers that is zero in the end; n:m says it by itself, 2:4 is a half."""
    pattern: str = Field("unstructured", pattern=r"^(unstructured|[1-9]\d*:[1-9]\d*)$")
    """Which weights may go: any of them, or with n:m all but n of each m neighbours in a row (2:4 is what NVIDIA's
    sparse tensor cores read)."""
    scope: Literal["row", "layer", "global"] = "layer"
    """Within what weights are ranked, and so what has the same share: each output row, each layer, or all layers."""
    criterion: Literal["magnitude", "wanda"] = "magnitude"
    """By what they are ranked: |w|, or |w| times the norm of its input over some training rows (Wanda, arXiv
    2306.11695, which ranks within rows)."""
    calibration_rows: int = Field(32, ge=1)
    """First rows of the training data that `wanda` reads, at every pruning."""
    modules: list[str] = []
    """Ends of the names of the linear layers to prune: q_proj, mlp.down_proj. By default all but the head."""
    schedule: AnySchedule = OneShot()
    """When they go."""

    @model_validator(mode="after")
    def _one_share(self) -> "SparsitySection":
        if self.kept_of is None:
            if self.share is None:
                raise ValueError("share: missing; unstructured sparsity needs one, e.g. share: 0.5")
        else:
            kept, group = self.kept_of
            if kept >= group:
                raise ValueError(f"pattern: {self.pattern} prunes nothing: of n:m, n has to be below m")
            if self.share is not None and self.share != 1 - kept / group:
                raise ValueError(f"share: {self.pattern} is a share of {1 - kept / group:g}: leave share out")
            if self.scope == "global":
                raise ValueError(f"scope: {self.pattern} gives every layer the same share: use layer or row")
        before = getattr(self.schedule, "before", [])
        if [*before, self.target] != sorted({*before, self.target}):
            raise ValueError(f"schedule.before: {before} has to rise, and to stay below the share of {self.target:g}")
        return self

    @property
    def kept_of(self) -> tuple[int, int] | None:
        """n and m of a pattern n:m: how many of how many neighbours stay."""
        if self.pattern == "unstructured":
            return None
        kept, group = self.pattern.split(":")
        return int(kept), int(group)

    @property
    def target(self) -> float:
        """The share of weights that is pruned in the end."""
        if self.kept_of is not None:
            return 1 - self.kept_of[0] / self.kept_of[1]
        assert self.share is not None
        return self.share

    def share_at(self, done: int, total: int) -> float:
        """Return the share of weights that is pruned after `done` of `total` optimiser steps, before the next."""
        return self.schedule.share_at(done, total, self.target)

    def describe(self) -> str:
        """Return in words what is pruned, how and when."""
        of = ", ".join(self.modules) or "all linear layers but the head"
        within = "all together" if self.scope == "global" else f"each {self.scope}"
        return f"{self.target:.0%} of {of}, {self.pattern}, by {self.criterion} in {within}, {self.schedule.name}"
