"""Bands: whether a prompt is solved always, sometimes or never, and what so many attempts know of it."""

from dataclasses import dataclass
from typing import Literal

Band = Literal["always", "sometimes", "never"]


@dataclass(frozen=True)
class PassRate:
    """In how many of its attempts at a prompt a student succeeded."""

    solved: int
    attempts: int

    @property
    def band(self) -> Band:
        if self.solved == 0:
            return "never"
        return "always" if self.solved == self.attempts else "sometimes"

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Return the exact interval (Clopper and Pearson 1934) of the probability of a success, at `level`.

        One-sided at both ends: never in K attempts bounds it by `1 - (1 - level)^(1/K)`, about 3 / K at 0.95, and no
        lower. So a band is a statement about K attempts.
        """
        from scipy.stats import beta

        miss = (1 - level) / (1 if self.band != "sometimes" else 2)
        failed = self.attempts - self.solved
        low = float(beta.ppf(miss, self.solved, failed + 1)) if self.solved else 0.0
        return low, float(beta.ppf(1 - miss, self.solved + 1, failed)) if failed else 1.0
