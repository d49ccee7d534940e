"""Roles: the networks of a run beside the student, by what moves them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Trainable:
    """A role whose weights the optimiser moves. What is None follows the run's training arguments.

    Attributes:
        make: builds the network from `(student, teacher)`; None for the student itself.
        learning_rate, betas, weight_decay, max_grad_norm: the role's own optimiser settings.
    """

    make: Callable[[Any, Any], nn.Module] | None = None
    learning_rate: float | None = None
    betas: tuple[float, float] | None = None
    weight_decay: float | None = None
    max_grad_norm: float | None = None


@dataclass(frozen=True)
class EmaOf:
    """A role that follows another as an exponential moving average, kept in float32 and moved when that role moved.

    Of a role that trains adapters it is the average of the merged weights, and a plain network.

    Attributes:
        role: what is followed.
        decay: the share of the average that a move leaves.
        every: it moves after so many of the role's own steps.
    """

    role: str
    decay: float = 0.999
    every: int = 1


@dataclass(frozen=True)
class SnapshotOf:
    """A role that is a frozen copy of another, trained or an average, in float32 and with adapters merged.

    The first copy is the role as it begins, at step 0.

    Attributes:
        role: what is copied.
        at: whether a new copy is taken when this many optimiser steps are done, e.g. `lambda done: done % 10 == 0`;
            None: when an epoch ends.
    """

    role: str
    at: Callable[[int], bool] | None = None


Role = Trainable | EmaOf | SnapshotOf
