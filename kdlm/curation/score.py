"""The step `score`: what a model gives every completion, token by token, without writing it."""

from dataclasses import asdict
from typing import Any, Literal

from datasets import Dataset
from pydantic import Field

from kdlm.curation.memory import Memory
from kdlm.curation.prompts import asked_of
from kdlm.curation.rows import with_columns
from kdlm.curation.step import Desk, Step, digest, lacks
from kdlm.curation.templates import check_template
from kdlm.data.report import Unusable
from kdlm.sandbox.progress import console
from kdlm.writers import Prompt, Scored, Scorer


class Score(Step):
    """A model scores every completion, given its prompt: adds `<into>_log_prob` (nats) and `<into>_tokens`.

    The text alone is scored, without a token that ends it, at temperature 1. Rows that the model cannot read have
    nulls, and are counted.
    """

    name: Literal["score"] = "score"
    by: str
    """The model, by its name among `writers`: `local`, or a server that echoes log-probabilities, as vLLM does."""
    into: str = Field(min_length=1)
    """What the columns begin with: `teacher` makes `teacher_log_prob` and `teacher_tokens`."""
    prompt: str = "{prompt}"
    """What the completion follows, with the columns of a row in braces, as in `generate`."""
    system: str | None = None
    """A system message before the prompt, which makes it a conversation."""
    chat: bool = False
    """Put a prompt that is text as the message of a user, as in `generate`."""
    column: str = "completion"
    """The column that is scored."""
    log_probs: bool = False
    """Keep `<into>_log_probs`, of every token, and `<into>_offsets`, the character at which each begins; `divergence`
    reads them."""

    def asks(self) -> dict[str, str]:
        return {"by": self.by}

    def run(self, rows: Dataset, desk: Desk) -> Dataset:
        self.leaves(rows.column_names)
        pairs = [self._pair(number, row, desk) for number, row in enumerate(rows)]  # pyright: ignore
        keys = [pair and digest(pair) for pair in pairs]
        known = self._scored({key: pair for key, pair in zip(keys, pairs, strict=True) if key and pair}, desk)
        scores = [known.get(key) if key else None for key in keys]
        own: dict[str, list[Any]] = {
            "log_prob": [score and sum(score.log_probs) for score in scores],
            "tokens": [score and len(score.log_probs) for score in scores],
        }
        if self.log_probs:
            own["log_probs"] = [score and score.log_probs for score in scores]
            own["offsets"] = [score and score.offsets for score in scores]
        return with_columns(rows, {f"{self.into}_{name}": values for name, values in own.items()})

    def leaves(self, before: list[str]) -> list[str]:
        lacks(before, "prompt", self.column, by="score")
        check_template(self.prompt, before, "score.prompt")
        names = ["log_prob", "tokens", *(["log_probs", "offsets"] if self.log_probs else [])]
        added = [f"{self.into}_{name}" for name in names]
        return [*before, *(name for name in added if name not in before)]

    def _pair(self, number: int, row: dict[str, Any], desk: Desk) -> tuple[Prompt, str] | None:
        """Return prompt and completion of a row; None where there is nothing to score, which is counted."""
        try:
            if row[self.column] is None:
                raise Unusable(f"no {self.column}", "")
            return asked_of(row, self.prompt, self.system, chat=self.chat), row[self.column]
        except Unusable as why:
            desk.counts.note("nothing to score", f"row {number}: {why}")
            return None

    def _scored(self, pairs: dict[str, tuple[Prompt, str]], desk: Desk) -> dict[str, Scored]:
        """Return the score of each pair by its hash: those that are remembered, and the others when they are made."""
        about = {"writer": desk.writers[self.by].identity()}
        known: dict[str, Scored] = {}

        def seen(key: str, value: Any) -> None:
            known[key] = Scored(value["log_probs"], value["offsets"])

        memory = Memory(None if desk.folder is None else desk.folder / "scores" / digest(about), about, seen)
        try:
            missing = [key for key in pairs if key not in known]
            if missing:
                writer = desk.writer(self.by)
                if not isinstance(writer, Scorer):
                    raise ValueError(f"score.by: {self.by}: {type(writer).__name__} cannot score what others wrote")
                with console(f"{self.by}: {len(missing)} of {len(pairs)} completions", len(missing)) as advance:
                    for place, score in writer.score([pairs[key] for key in missing]):
                        if isinstance(score, Scored):
                            known[missing[place]] = score
                            memory.add({missing[place]: asdict(score)})
                        else:
                            desk.counts.note("refused by the model", f"{missing[place]}: {score.reason}")
                        advance(1, "")
            return known
        finally:
            memory.close()
