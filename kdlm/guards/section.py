"""What a recipe says about its guards: which figures are watched, and how far each may go."""

import math

from pydantic import Field, model_validator

from kdlm.section import Section

CAUSAL = "guards: they watch causal language models, and the student is a masked one: remove the section"


class Limit(Section):
    """How far a figure may go; what is not finite is beyond any limit."""

    below: float | None = Field(None, allow_inf_nan=False)
    """Too far below this value."""
    above: float | None = Field(None, allow_inf_nan=False)
    """Too far above this value."""
    below_start: float | None = Field(None, gt=0, lt=1)
    """Too far below this share of the figure's first value: 0.2 is a fifth of it."""
    above_start: float | None = Field(None, gt=1, allow_inf_nan=False)
    """Too far above so many times the figure's first value."""

    @model_validator(mode="after")
    def _limits_something(self) -> "Limit":
        if all(limit is None for _, limit in self):
            raise ValueError("no limit: give below, above, below_start or above_start")
        return self

    @property
    def relative(self) -> bool:
        """Whether it asks for the figure's first value."""
        return self.below_start is not None or self.above_start is not None

    def crossed(self, value: float, start: float) -> str:
        """Return which limit a value is beyond, in words; empty where it is beyond none."""
        if not math.isfinite(value):
            return "not finite"
        for limit, said in (
            (self.below, f"below {self.below}"),
            (self.below_start and self.below_start * start, f"below {self.below_start} times its start, {start:.4g}"),
        ):
            if limit is not None and value < limit:
                return said
        for limit, said in (
            (self.above, f"above {self.above}"),
            (self.above_start and self.above_start * start, f"above {self.above_start} times its start, {start:.4g}"),
        ):
            if limit is not None and value > limit:
                return said
        return ""


class Watched(Section):
    """A figure that is watched."""

    warn: Limit | None = None
    """Beyond it a warning is logged, once."""
    stop: Limit | None = None
    """Beyond it the run ends, with a checkpoint."""
    patience: int = Field(3, ge=1)
    """Looks in a row that must be beyond a limit before anything is done: one of a few completions is noisy."""

    @model_validator(mode="after")
    def _does_something(self) -> "Watched":
        if self.warn is None and self.stop is None:
            raise ValueError("nothing to do: give warn, stop or both")
        return self


class GuardsSection(Section):
    """Figures of a language model that are watched while it trains: each may warn, and stop the run with a
    checkpoint."""

    every: int = Field(10, ge=1)
    """Optimiser steps between two looks; the first look is at step 1."""
    entropy: Watched | None = None
    """The student's entropy on the tokens that it trains on, in nats: where it falls towards 0 the student has
    settled on one text."""
    length: Watched | None = None
    """Tokens of the student's own completions."""
    repetition: Watched | None = None
    """Share of 4-grams that a completion of the student's own had before."""
    kl_to_start: Watched | None = None
    """KL(start || student) on a few rows that stay the same: how much is forgotten. A frozen copy of the start is kept,
    but for LoRA, whose base it is."""
    chosen_nll: Watched | None = None
    """Cross-entropy of the chosen side of preferences, in mean over tokens and then over pairs: where it turns up, the
    pull on the rejected side has begun to cost the chosen one."""
    rows: int = Field(16, ge=1)
    """How many rows `kl_to_start` is read on: evaluation rows where there are some, else training rows."""

    @model_validator(mode="after")
    def _watches_something(self) -> "GuardsSection":
        if not self.watched:
            raise ValueError("nothing is watched: give entropy, length, repetition, kl_to_start or chosen_nll")
        kl = self.kl_to_start
        if kl is not None and any(limit is not None and limit.relative for limit in (kl.warn, kl.stop)):
            raise ValueError("kl_to_start: it begins at 0, of which there are no multiples: give below or above")
        return self

    @property
    def watched(self) -> dict[str, Watched]:
        """The figures that are watched, by name."""
        names = ("entropy", "length", "repetition", "kl_to_start", "chosen_nll")
        named = {name: getattr(self, name) for name in names}
        return {name: one for name, one in named.items() if one is not None}

    def require(self, *, writes: bool, prefers: bool) -> None:
        """Raise ValueError, naming the key, where a figure is of completions and the student writes none, or is of
        preferences and the method takes none.
        """
        if self.chosen_nll is not None and not prefers:
            raise ValueError("guards.chosen_nll: the data have no chosen side for this method: remove it")
        for name in ("length", "repetition"):
            if name in self.watched and not writes:
                raise ValueError(f"guards.{name}: the student writes no text in this run: remove it, or add rollouts")
