"""Preferring: which of a prompt's completions is set against which, for the step `pairs`."""

from itertools import product
from typing import Annotated, Any, Literal

from pydantic import Field

from kdlm.curation.step import Counts, digest
from kdlm.section import Section

Row = dict[str, Any]
Found = list[tuple[Row, Row]]
"""Chosen and rejected rows of one prompt."""


class Preferring(Section):
    """A rule that sets completions of one prompt against each other, each of them in one pair at most."""

    def reads(self) -> list[str]:
        """Return the columns that the rule goes by."""
        raise NotImplementedError

    def pairs(self, rows: list[Row], key: Any, counts: Counts) -> Found:
        """Return the pairs, the best first. `key` is of prompt and seed; the order of the rows does not matter."""
        raise NotImplementedError


class Matched(Preferring):
    """A rule that has two sets of completions, any of the one to be preferred to any of the other."""

    match: Literal["length", "random"] = "length"
    """`length`: those nearest to each other in tokens first, so that length does not tell the sides apart; `random`:
    by the pipeline's seed."""

    def matched(self, good: list[Row], bad: list[Row], key: Any) -> Found:
        """Return disjoint pairs of the two sets, the best matched first."""
        good, bad = shuffled(good, key), shuffled(bad, key)
        if self.match == "random":
            return list(zip(good, bad, strict=False))
        found: dict[int, int] = {}
        places = product(range(len(good)), range(len(bad)))
        for one, other in sorted(places, key=lambda at: abs(length_of(good[at[0]]) - length_of(bad[at[1]]))):
            if one not in found and other not in found.values():
                found[one] = other
        return [(good[one], bad[other]) for one, other in found.items()]


class Right(Matched):
    """A right completion against a wrong one, by `verify`: the pairs of REDI (arXiv 2505.24850).

    What was cut is never preferred: a student would learn to end where it was.
    """

    name: Literal["right"] = "right"
    success: float = 1.0
    """Score from which on a completion is right."""
    truncated: bool = False
    """Let completions that were cut be wrong ones: they end in the middle, which is a mistake of another kind."""

    def reads(self) -> list[str]:
        return ["score"]

    def pairs(self, rows: list[Row], key: Any, counts: Counts) -> Found:
        good, bad = [], []
        for row in rows:
            if row.get("verdict", "judged") != "judged" or row["score"] is None:
                counts.note("completions that were not judged", row["prompt"])
            elif row["score"] >= self.success and row.get("stop") == "length":
                counts.note("completions that are right, but were cut", row["prompt"])
            elif row["score"] >= self.success:
                good.append(row)
            elif row.get("stop") == "length" and not self.truncated:
                counts.note("completions that are wrong because they were cut", row["prompt"])
            else:
                bad.append(row)
        return self.matched(good, bad, key)


class Ranked(Preferring):
    """The best completion against the worst, the second best against the second worst, by a number of theirs.

    By a teacher's log-probability it is teacher re-ranking.
    """

    name: Literal["ranked"] = "ranked"
    column: str = "score"
    """The number, larger for better: a score, or the log-probability that a teacher gives."""
    per_token: bool = False
    """Divide it by the completion's tokens, as is right for a sum of log-probabilities."""
    margin: float = Field(0.0, ge=0)
    """Only completions that are more than this apart."""

    def reads(self) -> list[str]:
        return [self.column, "tokens"] if self.per_token else [self.column]

    def pairs(self, rows: list[Row], key: Any, counts: Counts) -> Found:
        known = [row for row in rows if row[self.column] is not None and not (self.per_token and not row["tokens"])]
        if len(known) < len(rows):
            counts.note(f"completions without {self.column}", rows[0]["prompt"], len(rows) - len(known))
        best = sorted(shuffled(known, key), key=self._value, reverse=True)
        halves = zip(best[: len(best) // 2], best[::-1], strict=False)
        return [(one, other) for one, other in halves if self._value(one) - self._value(other) > self.margin]

    def _value(self, row: Row) -> float:
        return row[self.column] / row["tokens"] if self.per_token else row[self.column]


class OfModels(Matched):
    """What one model wrote against what another wrote: the teacher's against the student's."""

    name: Literal["models"] = "models"
    chosen: str
    """The model to be preferred, by the column `model`."""
    rejected: str
    """The other one."""

    def reads(self) -> list[str]:
        return ["model"]

    def pairs(self, rows: list[Row], key: Any, counts: Counts) -> Found:
        sides = [[row for row in rows if row["model"] == name] for name in (self.chosen, self.rejected)]
        return self.matched(*sides, key)


AnyPreferring = Annotated[Right | Ranked | OfModels, Field(discriminator="name")]
"""A rule of the step `pairs`, chosen by its `name`."""


def length_of(row: Row) -> int:
    """Return the tokens of a completion, or its characters where nobody counted them."""
    return row["tokens"] if row.get("tokens") is not None else len(row["completion"])


def shuffled(rows: list[Row], key: Any) -> list[Row]:
    """Return rows in an order that depends on the key and on what they hold, and not on the order they came in."""
    return sorted(rows, key=lambda row: digest([key, row["completion"], row.get("model"), row.get("sample")]))
