"""The step `language`: which language a text is in."""

import re
from typing import Any, Literal

import pyarrow as pa
from datasets import Dataset
from pydantic import Field

from kdlm.curation.rows import with_columns
from kdlm.curation.step import Desk, Step, lacks
from kdlm.curation.words import texts_of

_NOT_PROSE = re.compile(
    r"```.*?(?:```|\Z)|`[^`\n]*`|\$\$.*?\$\$|\$[^$\n]*\$|\\\[.*?\\\]|\\\(.*?\\\)|https?://\S+", re.DOTALL
)
NOT_A_LANGUAGE = "zxx"


class Language(Step):
    """Says which language a text is in, by py3langid (langid.py, ACL 2012), and leaves out those that are not wanted.

    Adds `language`: its ISO 639 code, or null where it is not decided: in short texts, code, mere formulas. Fenced
    code, formulas and links are not looked at.
    """

    name: Literal["language"] = "language"
    column: str = "prompt"
    """The column that is looked at."""
    keep: list[str] | None = Field(None, min_length=1)
    """The languages whose rows stay: [en]; null keeps all."""
    undecided: Literal["keep", "drop"] = "keep"
    """What becomes of rows whose language is not decided, where only some languages stay."""
    confidence: float = Field(0.5, ge=0, lt=1)
    """The probability from which on a language is decided."""

    def leaves(self, before: list[str]) -> list[str]:
        lacks(before, self.column, by="language")
        return list(dict.fromkeys([*before, "language"]))

    def run(self, rows: Dataset, desk: Desk) -> Dataset:
        self.leaves(rows.column_names)
        identifier, found = self._identifier(), []
        for value in rows[self.column]:
            text = _NOT_PROSE.sub(" ", "\n".join(texts_of(value)))
            code, probability = identifier.classify(text)
            found.append(None if code == NOT_A_LANGUAGE or probability < self.confidence else code)
        known = set(identifier.labels) - {NOT_A_LANGUAGE}
        if unknown := sorted(set(self.keep or []) - known):
            raise ValueError(f"language: keep: no language {unknown[0]!r}; there are: {', '.join(sorted(known))}")
        kept = []
        for number, code in enumerate(found):
            if self.keep is None or code in self.keep or (code is None and self.undecided == "keep"):
                kept.append(number)
            else:
                desk.counts.note(f"in {code}" if code else "in no language that is decided", f"row {number}")
        desk.counts.figures["undecided"] = found.count(None)
        return with_columns(rows, {"language": pa.array(found, pa.string())}).select(kept)

    def _identifier(self) -> Any:
        try:
            from py3langid.langid import MODEL_FILE, LanguageIdentifier
        except ImportError as error:
            raise ValueError(f"language: py3langid cannot be imported ({error}): pip install 'kdlm[curate]'") from error
        return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
