"""What a recipe says about privacy, and what a private run cannot have beside it."""

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from kdlm.guards import GuardsSection
from kdlm.methods import GRPO, Method
from kdlm.roles import Trainable
from kdlm.rollouts import RolloutSection
from kdlm.section import Section

if TYPE_CHECKING:
    from transformers import TrainingArguments


class PrivacySection(Section):
    """Train by DP-SGD, with one training row (a prompt with all its rollouts) as the unit that is protected."""

    clip: float = Field(1.0, gt=0)
    """C: the largest norm of what one unit adds to the gradient; a larger one is scaled down to it."""
    noise: float | None = Field(None, ge=0, allow_inf_nan=False)
    """s: each step's sum of clipped gradients gets Gaussian noise of standard deviation s * C. 0 promises nothing."""
    epsilon: float | None = Field(None, gt=0, allow_inf_nan=False)
    """Instead of `noise`: the least noise is taken with which the whole run stays below this epsilon."""
    delta: float = Field(1e-5, gt=0, lt=1)
    """The delta that epsilon is given at; less than one in the number of training rows."""
    accountant: Literal["rdp", "prv"] = "rdp"
    """How Opacus adds up the steps: Renyi orders, or privacy loss distributions (slower, a tighter epsilon)."""
    seed: int | None = None
    """Seed of noise, sampling, rollouts and dropout. By default the system gives one, kept in checkpoints alone; who
    knows it can take the noise off again, so a number here is for tests and comparisons."""

    @model_validator(mode="after")
    def _one_of_both(self) -> "PrivacySection":
        if (self.noise is None) == (self.epsilon is None):
            raise ValueError("say either noise, or the epsilon that the noise is to be chosen for")
        if self.clip == math.inf and self.noise != 0:
            raise ValueError("clip: noise is a multiple of it, and it is infinite: give a number, or noise: 0")
        return self


def refused(args: "TrainingArguments", method: Method, rollouts: RolloutSection | None) -> Iterator[str]:
    """Yield what breaks the guarantee, each line beginning with its key."""
    optimiser = str(getattr(args.optim, "value", args.optim))
    if "lomo" in optimiser or "layerwise" in optimiser:
        yield f"training.optim: {optimiser} moves weights inside the backward pass, before clipping and noise"
    if args.fp16:
        yield "training.fp16: its loss scaling skips steps by the data: use bf16 or float32"
    if args.auto_find_batch_size:
        yield "training.auto_find_batch_size: the sampling rate has to be known: set the batch size"
    if args.ignore_data_skip:
        yield "training.ignore_data_skip: a resumed run would draw the rows of earlier steps again: leave it out"
    if args.train_sampling_strategy != "random":
        yield f"training.train_sampling_strategy: {args.train_sampling_strategy}: rows have to be drawn by chance alone"
    if args.load_best_model_at_end or args.save_strategy == "best":
        yield (
            "training.load_best_model_at_end: choosing a checkpoint by evaluation is not accounted for: hand out the "
            "last one (no evaluation.best, no save_strategy: best)"
        )
    if args.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy"):
        yield f"training.lr_scheduler_type: {args.lr_scheduler_type.value} follows the losses: use another"
    if args.deepspeed or args.fsdp or args.world_size > 1:
        yield "privacy: a private run is one process without sharding: start it with `kdlm train` alone"
    if rollouts is not None and rollouts.reuse > 1:
        yield "rollouts.reuse: each step has to draw its rows anew: use reuse: 1"
    yield from _of_method(method)


def _of_method(method: Method) -> Iterator[str]:
    kind, name = type(method), type(method).__name__
    if isinstance(method, GRPO):
        yield f"method: {name} runs in TRL's trainer, which has no private steps"
    if sum(isinstance(role, Trainable) for role in method.roles.values()) > 1:
        yield f"method: {name} trains several networks; a private run trains the student alone"
    if kind.prepare is not Method.prepare:
        yield f"method: {name} makes its training rows of all the data, which no noise covers"
    moves = kind.stepped is not Method.stepped or kind.state_dict is not Method.state_dict
    if method.follows or moves:
        yield f"method: {name} has a state that follows the data, which no noise covers"


def stops(guards: GuardsSection) -> Iterator[str]:
    """Yield which guards would end the run by what they see."""
    for name, one in guards.watched.items():
        if one.stop is not None:
            yield f"guards.{name}.stop: it ends the run by a figure that has no noise on it: use `warn` only"


def promise(spent: Mapping[str, Any]) -> str:
    """Return what a model card says of a private run."""
    epsilon = "no epsilon (there was no noise)" if spent["epsilon"] is None else f"epsilon {spent['epsilon']:.4g}"
    return (
        f"Trained by DP-SGD: {epsilon} at delta {spent['delta']:g}. What is protected: {spent['unit']}. "
        f"Noise multiplier {spent['noise']:.4g}, clip {spent['clip']:g}, {spent['steps']} steps, each of "
        f"{spent['rows']} sequences in a step with probability {spent['sampling_rate']:.4g}; added up by Opacus "
        f"({spent['accountant']}). It covers these weights alone: not figures on held-out rows, other runs on the "
        "same rows, or what the teacher learned from."
    )
