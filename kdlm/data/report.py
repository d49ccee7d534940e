"""What became of the rows of a source: which were used, and which could not be and why."""

from dataclasses import asdict, dataclass, field
from typing import Any

EXAMPLES = 3
"""Unusable rows that are named for each reason; the others are counted."""


class Unusable(Exception):
    """A row that cannot be used: `reason` is the kind, counted; `detail` is about this row."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


@dataclass
class Unused:
    """The rows that one reason kept out: how many, and where the first ones are."""

    count: int = 0
    examples: list[str] = field(default_factory=list)


@dataclass
class SourceReport:
    """Counts of one source. Rows are those of the source; sequences are what they became."""

    source: str
    form: str = ""
    rows: int = 0
    kept: int = 0
    sequences: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    truncated: int = 0
    split: int = 0
    unused: dict[str, Unused] = field(default_factory=dict)

    def restart(self) -> None:
        """Set all counts to zero, for another pass over the source."""
        vars(self).update(vars(SourceReport(self.source, self.form)))

    def refuse(self, place: str, why: Unusable) -> None:
        """Count a row that cannot be used, and remember where it is."""
        self.rows += 1
        unused = self.unused.setdefault(why.reason, Unused())
        unused.count += 1
        if len(unused.examples) < EXAMPLES:
            unused.examples.append(f"{place}: {why.detail}" if why.detail else place)

    def keep(self, lengths: list[int], trained: int, truncated: bool) -> None:
        """Count a row that became sequences of these lengths, `trained` of whose tokens are trained on."""
        self.rows += 1
        self.kept += 1
        self.sequences += len(lengths)
        self.tokens += sum(lengths)
        self.trained_tokens += trained
        self.truncated += truncated
        self.split += len(lengths) > 1

    def lines(self) -> list[str]:
        """Return the report as lines of text, the first about the whole source."""
        notes = f", {self.truncated} cut at max_length" if self.truncated else ""
        notes += f", {self.split} split into pieces" if self.split else ""
        first = (
            f"{self.source} ({self.form}): {self.kept} of {self.rows} rows used, {self.sequences} sequences, "
            f"{self.tokens} tokens, {self.trained_tokens} trained on{notes}"
        )
        refused = [
            f"{self.source}: {unused.count} rows not used, {reason}: {'; '.join(unused.examples)}"
            + ("; ..." if unused.count > len(unused.examples) else "")
            for reason, unused in self.unused.items()
        ]
        return [first, *refused]

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "SourceReport":
        """Return the report that `dataclasses.asdict` turned into `values`."""
        return cls(**{**values, "unused": {reason: Unused(**u) for reason, u in values["unused"].items()}})


@dataclass
class DataReport:
    """The reports of all sources, and notes on splits and packing. A streamed source's is about its latest pass."""

    train: list[SourceReport]
    eval: list[SourceReport] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"train: {line}" for report in self.train for line in report.lines()]
        lines += [f"eval: {line}" for report in self.eval for line in report.lines()]
        return "\n".join([*lines, *self.notes])
