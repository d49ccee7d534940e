"""The step `thoughts`: long thoughts in one style: numbered steps and a marked answer."""

import re
from typing import Literal

import pyarrow as pa
from datasets import Dataset
from pydantic import Field

from kdlm.curation.rows import with_columns
from kdlm.curation.step import Desk, Step, lacks
from kdlm.sandbox.tasks import marked_answer

MARKER = re.compile(r"^\s*(?:#+\s*|\*\*)?step\s+\d+\s*[:.)]?\s*(?:\*\*)?[:.)]?\s*", re.IGNORECASE)

AROUND = frozenset("so thus hence therefore the our my final answer result is boxed".split())
"""Words of a line that gives the answer and nothing else."""


class Thoughts(Step):
    r"""Writes every completion in one style, and leaves out those that have none: steps, and a final answer.

    The reformatting of O1 Replication Journey, Part 2 (arXiv 2411.16489; its stages as commonly described) by rule,
    which cannot change what is said: paragraphs become `Step 1: ...`, the marked answer (`Answer: x`, `#### x`,
    `\boxed{x}`) the last line. A model may rewrite before it (`generate` with `into`); verify again after it did.
    """

    name: Literal["thoughts"] = "thoughts"
    column: str = "completion"
    """The column that is rewritten."""
    fewest: int = Field(1, ge=0)
    """Steps that a completion has at least."""
    most: int | None = Field(None, ge=1)
    """Steps that a completion has at most."""
    answer: Literal["boxed", "line"] = "boxed"
    r"""How the answer is written: `The answer is \boxed{x}.`, or `Answer: x`."""

    def leaves(self, before: list[str]) -> list[str]:
        lacks(before, self.column, by="thoughts")
        return before

    def run(self, rows: Dataset, desk: Desk) -> Dataset:
        self.leaves(rows.column_names)
        kept, written = [], []
        for number, text in enumerate(rows[self.column]):
            steps, answer = parsed(text or "")
            if answer is None or not answer.strip():
                desk.counts.note("no final answer", f"row {number}")
            elif not self.fewest <= len(steps) <= (self.most or len(steps)):
                desk.counts.note("too few or too many steps", f"row {number}: {len(steps)}")
            else:
                kept.append(number)
                written.append(styled(steps, answer, self.answer))
        return with_columns(rows.select(kept), {self.column: pa.array(written, pa.string())})


def parsed(text: str) -> tuple[list[str], str | None]:
    """Return the steps of a text, and its marked answer: steps begin with `Step n`, or else are its paragraphs, or
    lines where it has one paragraph. A last line that says more than the answer is a step, too.
    """
    answer = marked_answer(text)
    lines = text.strip().splitlines()
    while lines and answer is not None and (not lines[-1].strip() or _only_answers(lines[-1])):
        lines.pop()
    if any(MARKER.match(line) for line in lines):
        blocks: list[list[str]] = []
        for line in lines:
            if MARKER.match(line) or not blocks:
                blocks.append([MARKER.sub("", line)])
            else:
                blocks[-1].append(line)
        return [step for block in blocks if (step := "\n".join(block).strip())], answer
    whole = "\n".join(lines)
    parts = re.split(r"\n\s*\n", whole)
    return [step for part in (parts if len(parts) > 1 else lines) if (step := part.strip())], answer


def _only_answers(line: str) -> bool:
    """Tell whether a line has the marked answer and says nothing else, so that it may be written again."""
    answer = marked_answer(line)
    if not answer:
        return answer is not None
    before, _, after = line.replace("\u2212", "-").rpartition(answer)
    return AROUND.issuperset(re.findall(r"\w+", f"{before} {after}".lower()))


def styled(steps: list[str], answer: str, form: Literal["boxed", "line"]) -> str:
    """Return steps and answer as one text; `parsed` gives them back."""
    last = f"The answer is \\boxed{{{answer}}}." if form == "boxed" else f"Answer: {answer}"
    return "\n\n".join([*(f"Step {number}: {step}" for number, step in enumerate(steps, 1)), last])
