"""The step `verify`: a verifier scores every completion, and each prompt gets its pass rate."""

from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cache
from math import sqrt
from statistics import stdev
from typing import Any, Literal

import pyarrow as pa
from datasets import Dataset
from pydantic import Field

from kdlm.curation.memory import Memory
from kdlm.curation.step import Desk, Step, digest, lacks
from kdlm.rollouts import PassRate
from kdlm.sandbox.progress import console
from kdlm.verifiers import AnyVerifier, Judge, Verdict

OWN = pa.schema(
    [
        ("score", pa.float64()),
        ("verdict", pa.string()),
        ("reason", pa.string()),
        ("solved", pa.int32()),
        ("attempts", pa.int32()),
        ("solved_low", pa.float32()),
        ("solved_high", pa.float32()),
    ]
)
"""The columns that `verify` adds."""
ROWS_AT_ONCE = 4096
"""Rows that the verifier is handed at a time."""


class Verify(Step):
    """A verifier scores every completion: adds `score`, `verdict`, `reason`, and of each prompt its pass rate.

    That is `solved` of `attempts`, with the exact 95 % interval of the probability of success (Clopper and Pearson
    1934), `solved_low` to `solved_high`. What failed to be judged has score 0, counts as an attempt, and is counted by
    how it failed. Verdicts are kept as they come: a run that was killed judges what it has not yet.
    """

    name: Literal["verify"] = "verify"
    verifier: AnyVerifier
    """What scores a completion, by a column of the rows."""
    success: float = Field(1.0)
    """Score from which on a completion counts as solved."""
    column: str = "completion"
    """The column that is judged."""
    truncated: Literal["attempt", "leave_out"] = "attempt"
    """A completion that was cut (`stop` is `length`), in the pass rate: an attempt like any other, judged as it
    stands; or none, neither solved nor failed: then the rate is of those that came to their end."""

    def leaves(self, before: list[str]) -> list[str]:
        reference = self.verifier.column
        lacks(before, "prompt", self.column, *([] if reference is None else [reference]), by="verify")
        return [*(name for name in before if name not in OWN.names), *OWN.names]

    def settings(self) -> dict[str, Any]:
        return {**self.model_dump(mode="json"), "verifier": self._verifier()}

    def run(self, rows: Dataset, desk: Desk) -> Dataset:
        self.leaves(rows.column_names)
        rows = rows.remove_columns([name for name in OWN.names if name in rows.column_names])
        about = {"verifier": self._verifier(), "column": self.column}
        folder = None if desk.folder is None else desk.folder / "verdicts" / digest(about)
        memory = Memory(folder, about)
        try:
            verdicts = self._judged(rows, memory)
        finally:
            memory.close()
        keys = _keys(rows)
        for key, verdict in zip(keys, verdicts, strict=True):
            if verdict.outcome != "judged":
                desk.counts.note(f"verifier {verdict.outcome.replace('_', ' ')}", f"{key}: {verdict.reason}")
        rates = self._rates(rows, keys, verdicts)
        for name, value in summary(rates).items():
            desk.counts.figures[name] = value
        return _with(rows, keys, verdicts, rates)

    def _verifier(self) -> dict[str, Any]:
        """What verdicts depend on."""
        return self.verifier.model_dump(mode="json", exclude={"workers"})

    def _judged(self, rows: Dataset, memory: Memory) -> list[Verdict]:
        """Return the verdict of every row: what is remembered, and else what the verifier says."""
        said: dict[str, Verdict] = {}
        names: list[str] = []
        judge: Judge | None = None
        with console(f"verify: {len(rows)} completions", len(rows)) as advance:
            try:
                for some in _parts(rows):
                    own = [digest(row) for row in some]  # of all that the verifier sees
                    named = dict(zip(own, some, strict=True))
                    names += own
                    new = {name: row for name, row in named.items() if name not in memory}
                    if new and judge is None:
                        judge = Judge(self.verifier)
                    if new and judge is not None:
                        self._judge(judge, new, memory, lambda: advance(1, ""))
                    for name in named:
                        told = memory[name]
                        said[name] = Verdict(told["score"], told["outcome"], told["reason"])
                    advance(len(some) - len(new), "")
            finally:
                if judge is not None:
                    judge.close()
        return [said[name] for name in names]

    def _judge(self, judge: Judge, rows: Mapping[str, Any], memory: Memory, done: Any) -> None:
        names, table = list(rows), list(rows.values())
        reference = self.verifier.column

        def told(number: int, verdict: Verdict) -> None:
            said = {"score": verdict.score, "outcome": verdict.outcome, "reason": verdict.reason}
            memory.add({names[number]: said})
            done()

        references = None if reference is None else [row[reference] for row in table]
        try:
            judge.judge([row[self.column] or "" for row in table], references, table, told=told)
        except RuntimeError as error:
            raise ValueError(f"verify: {error}. {len(memory)} verdicts are kept") from error

    def _rates(self, rows: Dataset, keys: list[str], verdicts: list[Verdict]) -> dict[str, PassRate]:
        counted = [True] * len(keys)
        if self.truncated == "leave_out" and "stop" in rows.column_names:
            counted = [stop != "length" for stop in rows["stop"]]
        attempts = Counter(key for key, count in zip(keys, counted, strict=True) if count)
        right = [verdict.outcome == "judged" and verdict.score >= self.success for verdict in verdicts]
        solved = Counter(key for key, good, count in zip(keys, right, counted, strict=True) if good and count)
        return {key: PassRate(solved[key], attempts[key]) for key in dict.fromkeys(keys)}


def summary(rates: Mapping[str, PassRate]) -> dict[str, str]:
    """Return what the pass rates of prompts come to, for the reader."""
    known = [rate for rate in rates.values() if rate.attempts]
    if not known:
        return {"pass rate": "no attempts"}
    solved, attempts = sum(rate.solved for rate in known), sum(rate.attempts for rate in known)
    shares = [rate.solved / rate.attempts for rate in known]
    error = f" ± {stdev(shares) / sqrt(len(shares)):.3f} (standard error over prompts)" if len(shares) > 1 else ""
    found = Counter((rate.solved, rate.attempts) for rate in known)
    if len({rate.attempts for rate in known}) == 1 and len(found) <= 17:
        histogram = ", ".join(f"{of[0]}/{of[1]}: {count}" for of, count in sorted(found.items()))
    else:
        tenths = Counter(min(9, int(10 * share)) for share in shares)
        histogram = ", ".join(f"{n / 10:.1f}-{(n + 1) / 10:.1f}: {tenths[n]}" for n in range(10))
    return {
        "solved": f"{solved} of {attempts} completions",
        "pass rate": f"{sum(shares) / len(shares):.3f}{error}",
        "prompts by pass rate": histogram,
    }


@cache
def interval(solved: int, attempts: int) -> tuple[float, float]:
    """Return the 95 % interval of the probability of a success; all of it where there was no attempt."""
    return PassRate(solved, attempts).interval() if attempts else (0.0, 1.0)


def _parts(rows: Dataset) -> Iterator[list[dict[str, Any]]]:
    for start in range(0, len(rows), ROWS_AT_ONCE):
        yield rows.select(range(start, min(start + ROWS_AT_ONCE, len(rows)))).to_list()


def _keys(rows: Dataset) -> list[str]:
    """Return what each row's prompt is known by."""
    if "prompt_id" in rows.column_names:
        return list(rows["prompt_id"])
    return [digest(prompt) for prompt in rows["prompt"]]


def _with(rows: Dataset, keys: list[str], verdicts: list[Verdict], rates: Mapping[str, PassRate]) -> Dataset:
    bounds = [interval(rates[key].solved, rates[key].attempts) for key in keys]
    own = {
        "score": [verdict.score for verdict in verdicts],
        "verdict": [verdict.outcome for verdict in verdicts],
        "reason": [verdict.reason for verdict in verdicts],
        "solved": [rates[key].solved for key in keys],
        "attempts": [rates[key].attempts for key in keys],
        "solved_low": [low for low, _ in bounds],
        "solved_high": [high for _, high in bounds],
    }
    table: pa.Table = rows.with_format("arrow")[:]  # pyright: ignore[reportAssignmentType]
    for field in OWN:
        table = table.append_column(field, pa.array(own[field.name], field.type))
    return Dataset(table.replace_schema_metadata(None))
