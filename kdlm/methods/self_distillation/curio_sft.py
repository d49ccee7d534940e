"""CurioSFT: fine-tuning that keeps the student curious, held near a softened average of itself."""

from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from kdlm.losses import CrossEntropy, Softened, kept_rows, measures_for
from kdlm.methods.method import Batch, Nets, Step, Terms
from kdlm.methods.self_distillation.own_loss import OwnLoss
from kdlm.methods.tokens import TokenMethod, TokenOptions, Weighted
from kdlm.roles import EmaOf, Role, Trainable
from kdlm.signal import Rows, weights_of


class CurioSFT(TokenMethod):
    """`-log q(y) + weight (log q(y) - sg[log p~(y)])^2 / 2` at the labels y (CurioSFT, ACL 2026).

    The role `reference` is a moving average of the student, and p~ its distribution after a temperature of the token's
    own (`kdlm.losses.softening`): higher where the reference is unsure, so that such tokens are not sharpened away.
    The search for temperatures was compared with the released code; the squared term and the average's schedule are
    from a description of it and were not. Its RL stage is not here.

    Args:
        losses: none, the objective is the method's own.
        weight: of half the squared difference.
        temperatures: the least and the highest of a token.
        decay: share of the average that stays at each move.
        every: optimiser steps from one move of the average to the next.
    """

    paper = "CurioSFT, ACL 2026"
    needs = frozenset({"labels"})

    def __init__(self, losses=(), *, weight=1.0, temperatures=(1.1, 1.5), decay=0.99, every=5, **options):
        super().__init__(losses, **options)
        self.weight, self.decay, self.every = weight, decay, every
        self.softened: Any = Softened(*temperatures)

    @property
    def roles(self) -> dict[str, Role]:
        return {"student": Trainable(), "reference": EmaOf("student", self.decay, self.every)}

    def weighted(self, step: Step) -> list[Weighted]:
        return [("cross_entropy", CrossEntropy(), 1.0), ("anchor", self.softened, self.weight)]

    def ask_teacher(self, nets: Nets, batch: Batch, rows: Rows) -> Any:
        return nets["reference"](batch, rows)

    def evaluate(self, nets: Nets, batch: Batch, step: Step) -> Terms:
        """Give both terms, and every measure of the student against its average."""
        rows = kept_rows(batch["labels"], weights_of(batch))
        reference = nets["reference"](batch, rows)
        return self.compare(nets["student"](batch, rows), reference, rows, step, measures_for(type(reference)))


class CurioSFTSection(OwnLoss, TokenOptions):
    """Fine-tune with cross-entropy, the labels' probabilities held near those of a softened average of the student."""

    method: ClassVar = CurioSFT
    name: Literal["curio_sft"] = "curio_sft"
    weight: float = Field(1.0, ge=0)
    """Weight of half the squared difference of log-probabilities."""
    temperatures: tuple[float, float] = (1.1, 1.5)
    """Least and highest temperature of the average's distribution; each token has its own between them."""
    decay: float = Field(0.99, ge=0, lt=1)
    """Share of the average that stays at each move."""
    every: int = Field(5, ge=1)
    """Optimiser steps from one move of the average to the next."""

    @model_validator(mode="after")
    def _rising(self) -> "CurioSFTSection":
        low, high = self.temperatures
        if not 0 < low <= high:
            raise ValueError(f"temperatures: the least ({low:g}) must be above 0 and not above the highest ({high:g})")
        return self
