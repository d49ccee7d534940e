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
    its source's other columns as they are, but for those of these names. A chat is asked up to its last answer, which
    is the completion. Rows that cannot be read are counted. Raises ValueError where a source cannot be opened, or no
    row can be read.
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
            yield place, _row(form, _whole(row))
        except Unusable as why:
            counts.note(f"not read, {why.reason}", f"{place}: {why.detail}" if why.detail else place)


def dataset_of(rows: list[dict[str, Any]]) -> Dataset:
    """Return rows as a data set; a column that some rows lack is null there.

    A column with an empty object in it, which parquet cannot hold, becomes JSON text. Raises ValueError for values of
    mixed types, or too large.
    """
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = {}
    for name in names:
        try:
            columns[name] = pa.array([row.get(name) for row in rows])
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise ValueError(
                f"column {name!r}: values of several types ({error}): write all of them as text"
            ) from error
        except OverflowError as error:
            raise ValueError(f"column {name!r}: a number of more than 64 bits: write all of them as text") from error
        if _has_empty_object(columns[name].type):
            columns[name] = pa.array([None if row.get(name) is None else json.dumps(row[name]) for row in rows])
    return Dataset(pa.table(columns))


def with_columns(rows: Dataset, columns: Mapping[str, Any]) -> Dataset:
    """Return rows with columns added, or put in the place of those of the same name."""
    table: Any = rows.with_format("arrow")[:]
    for name, values in columns.items():
        place = table.column_names.index(name) if name in table.column_names else None
        made = values if isinstance(values, pa.Array | pa.ChunkedArray) else pa.array(values)
        table = table.append_column(name, made) if place is None else table.set_column(place, name, made)
    return Dataset(table.replace_schema_metadata(None))


def _has_empty_object(kind: Any) -> bool:
    parts = [kind.field(number).type for number in range(kind.num_fields)]
    return (pa.types.is_struct(kind) and not parts) or any(map(_has_empty_object, parts))


def _whole(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row as it is. Raises Unusable where half a character is in it, which no file of rows can hold."""
    for name, value in row.items():
        try:
            (value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)).encode()
        except UnicodeEncodeError as error:
            raise Unusable("malformed", f"half a character (a lone surrogate) in {name}") from error
    return row


def _row(form: Form, row: dict[str, Any]) -> dict[str, Any]:
    values = {ours: row.get(theirs) for ours, theirs in form.columns.items()}
    kept = {name: value for name, value in row.items() if name not in set(form.columns.values())}
    beside = {name: values[name] for name in values if name in ("domain", "reference", "weight", "context", "tools")}
    return {**(read := _read(form, values)), **{n: v for n, v in (kept | beside).items() if n not in read}}


def _read(form: Form, values: dict[str, Any]) -> dict[str, str]:
    """Return what a row asks and answers."""
    if form.name == "text":
        return {"text": read_text(values)}
    if form.name == "prompt":
        return {"prompt": as_text(read_prompt(values))}
    if form.name == "preference":
        (prompt, chosen), (_, rejected) = read_preference(values)
        return {"prompt": as_text(prompt), "chosen": as_text(chosen), "rejected": as_text(rejected)}
    if form.name == "completion":
        prompt, completion = read_completion(values)
        if isinstance(completion, str):
            return {"prompt": as_text(prompt), "completion": completion}
        messages: Any = [*prompt, *completion]
    else:
        messages = read_chat(values)
    if messages[-1]["role"] != "assistant":
        return {"prompt": as_text(messages)}
    if len(messages) == 1:
        raise Unusable("malformed", "the conversation begins with an assistant turn")
    return {"prompt": as_text(messages[:-1]), "completion": _answer(messages[-1])}


def _answer(message: dict[str, Any]) -> str:
    """Return the text of an answer. Raises Unusable where it is more than text."""
    content = message["content"]
    parts = [{"text": content}] if isinstance(content, str) else content
    texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
    read = [text for text in texts if isinstance(text, str)]
    if message.get("tool_calls") or len(read) < len(texts):
        raise Unusable("malformed", "the last answer is a tool call or a picture, not text alone")
    return "".join(read)


def as_text(prompt: str | list[dict[str, Any]]) -> str:
    """Return a prompt as its column holds it: messages as JSON."""
    return prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False)
