"""Tokenised sources: one source with the encoder of its form, as a stream of sequences or as a cached table."""

import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from kdlm.data.cache import BESIDE, SEQUENCES, TOKENS, cached_table, fingerprint, tokenizer_fingerprint
from kdlm.data.chat import template_text
from kdlm.data.encoding import Encoder
from kdlm.data.forms import (
    CONTEXTS,
    read_asked,
    read_context,
    read_domain,
    read_reference,
    read_score,
    read_weight,
    recognise,
)
from kdlm.data.report import SourceReport, Unusable
from kdlm.data.sections import DataSection, Source
from kdlm.data.sources import Opened, open_source
from kdlm.data.two_readings import CLOSING, COLUMNS, PairEncoder, teachers_section
from kdlm.signal import domain_id

log = logging.getLogger(__name__)

ENCODED_AT_ONCE = 256
"""Rows given to the tokenizer in one call."""


@dataclass(frozen=True)
class Tokenised:
    """A source that was found, and how its rows become sequences.

    Attributes:
        fingerprint: the hash of all that determines the sequences.
        report: about the latest pass over the sequences.
        asks: whether sequences carry what they ask, for contexts to be put into it.
    """

    source: Source
    opened: Opened
    encoder: Encoder | PairEncoder
    fingerprint: str
    report: SourceReport
    asks: bool = False

    @property
    def domain(self) -> int | None:
        """The number of the domain that all rows are of; None where each row names its own."""
        name = self.source.domain_name
        return None if name is None else domain_id(name)

    def sequences(self, *, warn: bool = False) -> Iterator[dict[str, Any]]:
        """Yield the sequences of all rows, counting in the report what is used and what is not.

        `key` is the hash of the content of the row, `domain` the number of its domain, `reference`, `weight` and
        `context` what its source names so, `asked` what it asks where contexts are put into prompts. `warn` logs the
        first row of each reason that one is not used.
        Raises ValueError when no row could be used.
        """
        report, columns = self.report, list(self.encoder.form.columns.values())
        domain, named = self.domain, self.encoder.form.columns
        report.restart()
        rows = islice(self.opened.read(columns), self.source.limit)
        while batch := list(islice(rows, ENCODED_AT_ONCE)):
            for (place, row), encoded in zip(batch, self.encoder(batch), strict=True):
                if isinstance(encoded, Unusable):
                    if warn and encoded.reason not in report.unused:
                        log.warning("%s: row not used, %s (others like it are only counted)", place, encoded)
                    report.refuse(place, encoded)
                    continue
                report.keep([len(one.ids) for one in encoded.sequences], encoded.trained, encoded.truncated)
                # weighed or scored anew, the same rows are held out
                said = (theirs for ours, theirs in named.items() if ours not in ("weight", "score"))
                key = content_key([row.get(theirs) for theirs in said])
                own = read_domain({"domain": row[named["domain"]]}) if domain is None else domain
                about: dict[str, Any] = {"key": key, "domain": own}
                if "reference" in named:
                    about["reference"] = read_reference({"reference": row[named["reference"]]})
                if "weight" in named:
                    about["weight"] = read_weight({"weight": row[named["weight"]]})
                if "score" in named:
                    about["score"] = read_score({"score": row[named["score"]]})
                for told in (name for name in CONTEXTS if name in named):
                    about[told] = read_context({told: row[named[told]]}, told)
                if self.asks:
                    values = {ours: row.get(theirs) for ours, theirs in named.items()}
                    about["asked"] = read_asked(self.encoder.form, values)
                for one in encoded.sequences:
                    yield {"input_ids": one.ids, "labels": one.labels, "length": len(one.ids), **one.beside, **about}
        if not report.kept:
            raise ValueError("\n".join([f"data source {self.source.path!r}: no usable row", *report.lines()]))

    def table(self, root: Path) -> tuple[datasets.Dataset, SourceReport]:
        """Return all sequences, from the cache under `root` if they are there, and the report of their making.

        The table has a column `domain` only where each row names its own: a source's domain may change its name
        without tokenising anything again.
        """
        schema = SEQUENCES
        for name, kind in BESIDE.items():
            if name in self.encoder.form.columns:
                schema = schema.append(pa.field(name, kind))
        if self.asks:
            schema = schema.append(pa.field("asked", pa.string()))
        if self.encoder.form.name == "preference":
            for name in ("seq_lengths", "rejected"):
                schema = schema.append(pa.field(name, TOKENS))
        if isinstance(self.encoder, PairEncoder):
            for name in (*COLUMNS, CLOSING):
                schema = schema.append(pa.field(name, TOKENS))
        table, about = cached_table(
            root, self.fingerprint, schema, self.sequences(), lambda: {"report": asdict(self.report)}
        )
        return table, SourceReport.from_dict(about["report"])


def tokenised(
    source: Source,
    section: DataSection,
    tokenizer: PreTrainedTokenizerBase,
    teacher: PreTrainedTokenizerBase | None = None,
    *,
    stored: bool = True,
) -> Tokenised:
    """Find a source, recognise its columns and fit an encoder to them: for two readings where `teacher` is a tokenizer.

    The fingerprint is of the content when the sequences are to be `stored`, else of names, sizes and times of files:
    a stream may be too long to be read twice. Raises ValueError when something does not fit.
    """
    opened = open_source(source, stream=section.streaming)
    form = recognise(source, opened.columns)
    try:
        encoder = (
            Encoder(tokenizer, section, form) if teacher is None else PairEncoder(tokenizer, teacher, section, form)
        )
    except ValueError as error:
        raise ValueError(f"data source {source.path!r}: {error}") from error
    name = fingerprint(
        opened.digest(stored),
        source.model_dump(include={"subset", "split", "limit", "sample_by", "format"}, mode="json"),
        asdict(form),
        section.model_dump(include={"max_length", "truncation", "loss_on", "chat_template_args"}, mode="json"),
        template_text(section.chat_template),
        tokenizer_fingerprint(tokenizer),
        *([] if teacher is None else second_reading(section, teacher)),
        *([] if section.context is None else ["asked"]),
    )
    return Tokenised(source, opened, encoder, name, SourceReport(source.path, form.name), section.context is not None)


def second_reading(section: DataSection, teacher: PreTrainedTokenizerBase) -> list[Any]:
    """Return all that determines what a teacher's tokenizer makes of the rows."""
    return [
        tokenizer_fingerprint(teacher),
        section.teacher_max_length or section.max_length,
        template_text(section.teacher_chat_template),
    ]


def made_with(
    section: DataSection, tokenizer: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase | None = None
) -> dict[str, Any]:
    """Return, by name, the settings that decide which tokens a row becomes: what may differ between two runs.

    With `teacher`, the tokens of its own reading; where plain text is cut, the student's have a say in that.
    """
    if teacher is not None:
        student = {
            "student_tokenizer": tokenizer_fingerprint(tokenizer, chat_template=False),
            "student_max_length": section.max_length,
        }
        return made_with(teachers_section(section), teacher) | student
    template = template_text(section.chat_template) or tokenizer.chat_template
    return {
        "tokenizer": tokenizer_fingerprint(tokenizer, chat_template=False),
        "chat_template": fingerprint(template),
        **section.model_dump(include={"max_length", "truncation", "loss_on", "chat_template_args"}, mode="json"),
        "data": [source.path for source in (*section.train, *(section.eval or []))],
    }


def content_key(values: list[Any]) -> int:
    """Return a hash of a row's values, as a signed 64-bit integer."""
    text = json.dumps(values, sort_keys=True, default=str)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), signed=True)
