"""The step `verify`: a verifier scores every completion, and each prompt gets its pass rate."""

from collections import Counter
from typing import Any, Literal

from datasets import Dataset
from pydantic import Field

from kdlm.curation.generate import digest
from kdlm.curation.step import Desk, Step, need
from kdlm.verifiers import AnyVerifier, Judge, Verdict


class Verify(Step):
    """A verifier scores every completion: adds `score`, `verdict`, `reason`, and of each prompt `solved`, `attempts`.

    What failed to be judged has score 0, counts as an attempt, and is counted by how it failed.
    """

    name: Literal["verify"] = "verify"
    verifier: AnyVerifier
    """What scores a completion, by a column of the rows."""
    success: float = Field(1.0)
    """Score from which on a completion counts as solved."""
    column: str = "completion"
    """The column that is judged."""

    def run(self, rows: Dataset, desk: Desk) -> Dataset:
        reference = self.verifier.column
        need(rows, "prompt", self.column, *([] if reference is None else [reference]), by="verify")
        table: list[dict[str, Any]] = [dict(row) for row in rows]
        with Judge(self.verifier) as judge:
            verdicts = judge.judge(
                [row[self.column] or "" for row in table],
                None if reference is None else [row[reference] for row in table],
                table,
            )
        keys = [row.get("prompt_id") or digest(row["prompt"]) for row in table]
        attempts = Counter(keys)
        solved = Counter(key for key, verdict in zip(keys, verdicts, strict=True) if self._right(verdict))
        for key, verdict in zip(keys, verdicts, strict=True):
            if verdict.outcome != "judged":
                desk.counts.note(f"verifier {verdict.outcome.replace('_', ' ')}", f"{key}: {verdict.reason}")
        desk.counts.figures["solved"] = f"{sum(solved.values())} of {len(table)} completions"
        own = {
            "score": [verdict.score for verdict in verdicts],
            "verdict": [verdict.outcome for verdict in verdicts],
            "reason": [verdict.reason for verdict in verdicts],
            "solved": [solved[key] for key in keys],
            "attempts": [attempts[key] for key in keys],
        }
        rows = rows.remove_columns([name for name in own if name in rows.column_names])
        for name, values in own.items():
            rows = rows.add_column(name, values)  # pyright: ignore[reportCallIssue]
        return rows

    def _right(self, verdict: Verdict) -> bool:
        return verdict.outcome == "judged" and verdict.score >= self.success
