"""The step `divergence`: how many sentences of a completion the teacher finds far likelier than the student."""

from typing import Any, Literal

from datasets import Dataset
from pydantic import Field

from kdlm.curation.rows import with_columns
from kdlm.curation.sentences import sentence_probabilities, sentence_starts
from kdlm.curation.step import Desk, Step, lacks

SIDES = ("teacher", "shared", "student")


class Divergence(Step):
    """Divergence-aware sampling (DASD, arXiv 2601.09088): `select` what is rich in `teacher_sentences`.

    Adds `sentences` (how many), the shares of them that are `teacher_sentences`, `shared_sentences` and
    `student_sentences`, and `teacher_gap`, the mean of p_T - p_S. Both models are scored before, with `log_probs`;
    their tokenizers may differ. Shares are null where there is no sentence.
    """

    name: Literal["divergence"] = "divergence"
    teacher: str = "teacher"
    """What the columns of the teacher's scores begin with: `into` of its `score`."""
    student: str = "student"
    """What the columns of the student's scores begin with."""
    column: str = "completion"
    """The column that was scored."""
    margin: float = Field(0.1, ge=0, lt=1)
    """How far apart the two probabilities of a sentence (0 to 1) are that is not shared. The paper says: well above;
    the number is ours."""

    def run(self, rows: Dataset, desk: Desk) -> Dataset:
        self.leaves(rows.column_names)
        found = [self._gaps(row) for row in rows]
        for number, gaps in enumerate(found):
            if not gaps:
                desk.counts.note("no sentence", f"row {number}")
        sides = [[self._side(gap) for gap in gaps] for gaps in found]
        own: dict[str, list[Any]] = {"sentences": [len(gaps) for gaps in found]}
        for side in SIDES:
            own[f"{side}_sentences"] = [one.count(side) / len(one) if one else None for one in sides]
            desk.counts.figures[f"{side} sentences"] = sum(one.count(side) for one in sides)
        own["teacher_gap"] = [sum(gaps) / len(gaps) if gaps else None for gaps in found]
        return with_columns(rows, own)

    def leaves(self, before: list[str]) -> list[str]:
        read = [f"{one}_{what}" for one in (self.teacher, self.student) for what in ("log_probs", "offsets")]
        lacks(before, self.column, *read, by="divergence")
        return list(dict.fromkeys([*before, "sentences", *(f"{side}_sentences" for side in SIDES), "teacher_gap"]))

    def _gaps(self, row: Any) -> list[float]:
        """Return p_T - p_S of each sentence that both models know."""
        scores = [(row[f"{one}_log_probs"], row[f"{one}_offsets"]) for one in (self.teacher, self.student)]
        if row[self.column] is None or any(values is None for values, _ in scores):
            return []
        starts = sentence_starts(row[self.column])
        teacher, student = (sentence_probabilities(*score, starts) for score in scores)
        return [p - q for p, q in zip(teacher, student, strict=True) if p is not None and q is not None]

    def _side(self, gap: float) -> str:
        return "shared" if abs(gap) <= self.margin else "teacher" if gap > 0 else "student"
