"""The step `score`: what a model gives every completion, token by token, without writing it."""

from dataclasses import asdict
from typing import Any, Literal

from datasets import Dataset
from pydantic import Field

from kdlm.curation.generate import asked_of, digest
from kdlm.curation.lines import Lines
from kdlm.curation.rows import with_columns
from kdlm.curation.step import Desk, Step, need
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
    column: str = "completion"
    """The column that is scored."""
    log_probs: bool = False
    """Keep `<into>_log_probs`, of every token, and `<into>_offsets`, the character at which each begins; `divergence`
    reads them."""

    def asks(self) -> dict[str, str]:
        return {"by": self.by}

    def run(self, rows: Dataset, desk: Desk) -> Dataset:
        need(rows, "prompt", self.column, by="score")
        pairs = [(asked_of(row, self.prompt, self.system), row[self.column]) for row in rows]  # pyright: ignore
        keys = [digest(pair) for pair in pairs]
        known = self._scored({key: pair for key, pair in zip(keys, pairs, strict=True) if pair[1] is not None}, desk)
        scores = [known.get(key) for key in keys]
        for number, pair in enumerate(pairs):
            if pair[1] is None:
                desk.counts.note("nothing to score", f"row {number}")
        own: dict[str, list[Any]] = {
            "log_prob": [score and sum(score.log_probs) for score in scores],
            "tokens": [score and len(score.log_probs) for score in scores],
        }
        if self.log_probs:
            own["log_probs"] = [score and score.log_probs for score in scores]
            own["offsets"] = [score and score.offsets for score in scores]
        return with_columns(rows, {f"{self.into}_{name}": values for name, values in own.items()})

    def _scored(self, pairs: dict[str, tuple[Prompt, str]], desk: Desk) -> dict[str, Scored]:
        """Return the score of each pair by its hash: those that are remembered, and the others when they are made."""
        about = {"writer": desk.writers[self.by].identity()}
        lines = Lines(None if desk.folder is None else desk.folder / "scores" / digest(about), about)
        try:
            known = {record.pop("key"): Scored(**record) for record in lines.read()}
            missing = [key for key in pairs if key not in known]
            if missing:
                writer = desk.writer(self.by)
                if not isinstance(writer, Scorer):
                    raise ValueError(f"score.by: {self.by}: {type(writer).__name__} cannot score what others wrote")
                with console(f"{self.by}: {len(missing)} of {len(pairs)} completions", len(missing)) as advance:
                    for place, score in writer.score([pairs[key] for key in missing]):
                        if isinstance(score, Scored):
                            known[missing[place]] = score
                            lines.add({"key": missing[place], **asdict(score)})
                        else:
                            desk.counts.note("refused by the model", f"{missing[place]}: {score.reason}")
                        advance(1, "")
            return known
        finally:
            lines.close()
