"""Rows: what the sources of a pipeline hold, as one data set with text columns."""

import json
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import pyarrow as pa
from datasets import Dataset

from kdlm.curation.step import Counts
from kdlm.data.forms import Form, read_chat, read_completion, read_preference, read_prompt, read_text, recognise
from kdlm.data.report import Unusable
from kdlm.data.sections import Source
from kdlm.data.sources import Opened, open_source


def read(sources: list[Source], counts: Counts) -> tuple[Dataset, list[str]]:
    """Return all rows of the sources, and a digest of the content of each source.

    A row has `prompt` (text, or messages as JSON text) and `completion` or `text`, as far as its source has them, and
    its source's other columns as they are. A chat is asked up to its last answer, which is the completion. Rows that
    cannot be read are counted. Raises ValueError where a source cannot be opened, or no row can be read.
    """
    made: list[dict[str, Any]] = []
    digests = []
    for source in sources:
        opened = open_source(source)
        made += [row for _, row in placed(source, opened, counts)]
        digests.append(opened.digest(True))
    if not made:
        raise ValueError("\n".join(["sources: no row can be read", *counts.lines()]))
    return dataset_of(made), digests


def placed(source: Source, opened: Opened, counts: Counts) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the rows of a source as `read` makes them, each with its place. Those that cannot be read are counted."""
    form = recognise(source, opened.columns)
    for place, row in islice(opened.read(opened.columns), source.limit):
        try:
            yield place, _row(form, row)
        except Unusable as why:
            counts.note(f"not read, {why.reason}", f"{place}: {why.detail}" if why.detail else place)


def dataset_of(rows: list[dict[str, Any]]) -> Dataset:
    """Return rows as a data set; a column that some rows lack is null there. Raises ValueError for mixed types."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = {}
    for name in names:
        try:
            columns[name] = pa.array([row.get(name) for row in rows])
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise ValueError(f"column {name!r}: values of several types ({error})") from error
    return Dataset(pa.table(columns))


def with_columns(rows: Dataset, columns: Mapping[str, Any]) -> Dataset:
    """Return rows with columns added, or put in the place of those of the same name."""
    table: Any = rows.with_format("arrow")[:]
    for name, values in columns.items():
        place = table.column_names.index(name) if name in table.column_names else None
        made = values if isinstance(values, pa.Array | pa.ChunkedArray) else pa.array(values)
        table = table.append_column(name, made) if place is None else table.set_column(place, name, made)
    return Dataset(table.replace_schema_metadata(None))


def _row(form: Form, row: dict[str, Any]) -> dict[str, Any]:
    values = {ours: row.get(theirs) for ours, theirs in form.columns.items()}
    kept = {name: value for name, value in row.items() if name not in set(form.columns.values())}
    beside = {name: values[name] for name in values if name in ("domain", "reference", "weight", "context", "tools")}
    if form.name == "text":
        return {"text": read_text(values), **kept, **beside}
    if form.name == "prompt":
        return {"prompt": _text(read_prompt(values)), **kept, **beside}
    if form.name == "preference":
        (prompt, chosen), (_, rejected) = read_preference(values)
        return {"prompt": _text(prompt), "chosen": _text(chosen), "rejected": _text(rejected), **kept, **beside}
    if form.name == "completion":
        prompt, completion = read_completion(values)
        if isinstance(completion, str):
            return {"prompt": _text(prompt), "completion": completion, **kept, **beside}
        messages: Any = [*prompt, *completion]
    else:
        messages = read_chat(values)
    if messages[-1]["role"] != "assistant":
        return {"prompt": _text(messages), **kept, **beside}
    if len(messages) == 1:
        raise Unusable("malformed", "the conversation begins with an assistant turn")
    return {"prompt": _text(messages[:-1]), "completion": messages[-1]["content"], **kept, **beside}


def _text(prompt: str | list[dict[str, Any]]) -> str:
    return prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False)
