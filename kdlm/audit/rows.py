"""Rows of text that someone wrote: what was asked, what was answered, and where it stands."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from kdlm.audit.personal_data import masked, personal
from kdlm.data import Source
from kdlm.data.forms import read_chat, read_completion, read_text, recognise
from kdlm.data.report import SourceReport, Unusable
from kdlm.data.sources import open_source


@dataclass(frozen=True)
class Row:
    """What was asked and what was answered; plain text was asked nothing.

    Attributes:
        place: `file:line`.
    """

    place: str
    prompt: str
    completion: str

    def cleaned(self, region: str | None = None) -> tuple["Row", tuple[str, ...]]:
        """Return the row without what is personal or secret, and the kinds of that which it had."""
        asked, answered = personal(self.prompt, region), personal(self.completion, region)
        clean = Row(self.place, masked(self.prompt, asked), masked(self.completion, answered))
        return clean, tuple(dict.fromkeys(hit.kind for hit in (*asked, *answered)))


@dataclass(frozen=True)
class Corpus:
    """Rows of one source. A document is all that was answered to one prompt; plain text is one by itself.

    The answers to one prompt share its subject, so they are no independent witnesses.
    """

    name: str
    rows: Sequence[Row]
    report: SourceReport

    @cached_property
    def documents(self) -> list[list[int]]:
        """The rows of each document, by number."""
        groups: dict[str | int, list[int]] = {}
        for number, row in enumerate(self.rows):
            groups.setdefault(row.prompt or number, []).append(number)
        return list(groups.values())


def read_rows(path: str) -> Corpus:
    """Read a file, folder, hub id or `sandbox:NAME` with prompts and completions, messages or text.

    Raises ValueError when it cannot be opened, has no answers, or no row of it can be used.
    """
    source = Source(path=path)
    opened = open_source(source)
    form = recognise(source, opened.columns)
    if form.name == "prompt":
        raise ValueError(f"data source {path!r}: it has prompts and no answers: expected a column `completion` beside")
    report, rows = SourceReport(path, form.name), []
    for place, values in opened.read(list(form.columns.values())):
        try:
            row = row_of(place, {ours: values.get(theirs) for ours, theirs in form.columns.items()})
        except Unusable as why:
            report.refuse(place, why)
            continue
        report.rows, report.kept = report.rows + 1, report.kept + 1
        rows.append(row)
    if not rows:
        raise ValueError(f"data source {path!r}: no row can be used: {'; '.join(report.lines()[1:])}")
    return Corpus(path, rows, report)


def row_of(place: str, values: dict[str, Any]) -> Row:
    """Return a row with a `text`, `messages`, or a `prompt` and a `completion`, each text or messages.

    Raises Unusable where it has no answer.
    """
    if "text" in values:
        return Row(place, "", read_text(values))
    if "completion" not in values:
        messages: list[Any] = read_chat(values)
    else:
        prompt, completion = read_completion(values)
        if isinstance(prompt, str) and isinstance(completion, str):
            return Row(place, prompt, completion)
        messages = [*prompt, *completion]
    asked = "\n".join(_said(message) for message in messages if message["role"] != "assistant")
    answered = "\n".join(_said(message) for message in messages if message["role"] == "assistant")
    if not answered.strip():
        raise Unusable("empty", "nothing was answered")
    return Row(place, asked, answered)


def _said(message: dict[str, Any]) -> str:
    content = message["content"]
    if isinstance(content, str):
        return content
    return "\n".join(part["text"] for part in content if isinstance(part, dict) and isinstance(part.get("text"), str))
