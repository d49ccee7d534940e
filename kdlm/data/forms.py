"""Forms: what the columns of a source hold, and one row of it in that form.

Recognised, in this order: `messages` (chat), `conversations` (chat in ShareGPT's from/value words, or role/content),
`prompt` with `completion` (both text, or lists of messages), `prompt` with `chosen` and `rejected` (a preference: two
completions), `text`, `prompt` alone (for the student to complete). A column that the source maps decides first.
`tools`, `domain`, `reference`, `weight`, `score`, `context`, `contexts` and `bad_context` come beside these; all but
the first only where the source maps them.
"""

import json
import math
from dataclasses import dataclass
from typing import Any, Literal

from kdlm.data.report import Unusable
from kdlm.data.sections import Source
from kdlm.signal import domain_id

Message = dict[str, Any]

Kind = Literal["chat", "completion", "preference", "text", "prompt"]

FORMS: dict[tuple[str, ...], Kind] = {
    ("messages",): "chat",
    ("conversations",): "chat",
    ("prompt", "completion"): "completion",
    ("prompt", "chosen", "rejected"): "preference",
    ("text",): "text",
    ("prompt",): "prompt",
}
CONTEXTS = ("context", "contexts", "bad_context")
"""What a teacher may be told: each is text in a row of tokens, a list of several as JSON."""
SIDES = ("chosen", "rejected")
"""The two completions of a preference."""
BESIDE = ("domain", "reference", "weight", "score", *CONTEXTS)

SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool"}


@dataclass(frozen=True)
class Form:
    """How to read the rows of a source.

    Attributes:
        name: the kind of row.
        columns: kdlm's column -> the source's.
    """

    name: Kind
    columns: dict[str, str]


def recognise(source: Source, columns: list[str]) -> Form:
    """Return the form of a source with these columns; ValueError when it has none of the known ones."""
    mapped: dict[str, str] = {**source.columns}
    for ours, theirs in mapped.items():
        if theirs not in columns:
            raise ValueError(
                f"data source {source.path!r}: `columns` maps {ours} to {theirs!r}, but its columns are "
                f"{', '.join(map(repr, columns))}"
            )
    known = {name: name for name in ("messages", "conversations", "prompt", "completion", *SIDES, "text", "tools")}
    usable = {ours: theirs for ours, theirs in (known | mapped).items() if theirs in columns}
    for needed, name in FORMS.items():
        chosen = not (mapped.keys() - {"tools", *BESIDE}) or mapped.keys() & set(needed)
        chosen = chosen and not (mapped.keys() & set(SIDES)) - set(needed)
        if chosen and usable.keys() >= set(needed):
            kept = (*needed, "tools") if name != "text" and "tools" in usable else needed
            kept = (*kept, *(name for name in BESIDE if name in mapped))
            return Form(name, {ours: usable[ours] for ours in kept})
    raise ValueError(
        f"data source {source.path!r}: cannot tell what its columns {', '.join(map(repr, columns))} hold: expected "
        "`messages`, `conversations`, `prompt` and `completion`, `prompt` with `chosen` and `rejected`, `text`, or "
        "`prompt` alone; say which is which, e.g. "
        "columns: {prompt: question, completion: answer}"
    )


def read_text(row: dict[str, Any]) -> str:
    """Return the text of a row of form `text`."""
    return _string(row, "text")


def read_chat(row: dict[str, Any]) -> list[Message]:
    """Return the messages of a row of form `chat`."""
    column = "messages" if "messages" in row else "conversations"
    return read_messages(_parsed(row[column]), column)


def read_completion(row: dict[str, Any]) -> tuple[str, str] | tuple[list[Message], list[Message]]:
    """Return prompt and completion, both text or both messages: a text beside messages is the user's or assistant's."""
    prompt, completion = _parsed(row["prompt"]), _parsed(row["completion"])
    if isinstance(prompt, str | None) and isinstance(completion, str | None):
        if prompt is None:
            raise Unusable("malformed", "prompt is missing")
        return prompt, _string(row, "completion")
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    return read_messages(prompt, "prompt"), read_messages(completion, "completion")


def read_preference(row: dict[str, Any]) -> list[Any]:
    """Return prompt and completion of either side, as `read_completion` does, the chosen one first."""
    read: list[Any] = []
    for side in SIDES:
        try:
            read.append(read_completion({"prompt": row["prompt"], "completion": row[side]}))
        except Unusable as why:
            raise Unusable(why.reason, f"{side}: {why.detail}") from why
        if not isinstance(read[-1][1], str) and read[-1][1][0]["role"] != "assistant":
            raise Unusable("malformed", f"{side} does not begin with an assistant turn: leave the prompt out of it")
    if isinstance(read[0][1], str) != isinstance(read[1][1], str):
        raise Unusable("malformed", "chosen and rejected: one is text and one is messages")
    return read


def read_prompt(row: dict[str, Any]) -> str | list[Message]:
    """Return the prompt of a row of form `prompt`, text or messages."""
    prompt = _parsed(row["prompt"])
    return _string(row, "prompt") if isinstance(prompt, str | None) else read_messages(prompt, "prompt")


def read_tools(row: dict[str, Any]) -> list[dict[str, Any]] | None:
    """Return the tool descriptions of a row, or None."""
    tools = _parsed(row.get("tools"))
    if not tools:
        return None
    if not isinstance(tools, list):
        raise Unusable("malformed", f"tools is {type(tools).__name__}, not a list")
    return tools


def read_domain(row: dict[str, Any]) -> int:
    """Return the number of the domain that a row names in its column `domain`."""
    value = row["domain"]
    if isinstance(value, str | int) and str(value):
        return domain_id(str(value))
    raise Unusable("malformed", f"domain is {type(value).__name__}, not a name")


def read_reference(row: dict[str, Any]) -> str:
    """Return what a row names in its column `reference`: text as it is, anything else as JSON."""
    value = row["reference"]
    if value is None or value == "":
        raise Unusable("empty", "reference is empty")
    return value if isinstance(value, str) else json.dumps(value, default=str)


def read_weight(row: dict[str, Any]) -> float:
    """Return the number in a row's column `weight`: finite and not below 0."""
    value = row["weight"]
    if value is None:
        raise Unusable("malformed", "weight is missing")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Unusable("malformed", f"weight is {type(value).__name__}, not a number")
    if not 0 <= value < math.inf:
        raise Unusable("malformed", f"weight is {value:g}, not a finite number from 0 on")
    return float(value)


def read_score(row: dict[str, Any]) -> float:
    """Return the number that a row has in its column `score`."""
    value = row["score"]
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise Unusable("malformed", f"score is {value!r}, not a finite number")
    return float(value)


def read_context(row: dict[str, Any], name: str = "context") -> str:
    """Return what a row names in one of its `CONTEXTS`: text as it is, anything else as JSON; "" where it has none."""
    value = row[name]
    if value is None or isinstance(value, str):
        return value or ""
    return json.dumps(value, default=str)


def read_asked(form: Form, row: dict[str, Any]) -> str:
    """Return, as JSON, what a row asks: `{"prompt": text}`, or the `messages` before its last answer, with `tools`.

    Raises Unusable for plain text, which asks nothing.
    """
    if form.name == "text":
        raise Unusable("malformed", "plain text has no prompt that a context could be put into")
    if form.name == "chat":
        asked: str | list[Message] = _before_last_answer(read_chat(row))
    elif form.name == "prompt":
        asked = read_prompt(row)
    else:
        pair: Any = read_completion(row)  # of text, or of messages
        asked = pair[0] if isinstance(pair[0], str) else _before_last_answer([*pair[0], *pair[1]])
    if isinstance(asked, str):
        return json.dumps({"prompt": asked}, ensure_ascii=False)
    return json.dumps({"messages": asked, "tools": read_tools(row)}, ensure_ascii=False, default=str)


def _before_last_answer(messages: list[Message]) -> list[Message]:
    last = max((n for n, message in enumerate(messages) if message["role"] == "assistant"), default=len(messages))
    return messages[:last]


def read_messages(value: Any, column: str) -> list[Message]:
    """Return messages with `role` and `content`; keys whose value is None (Arrow fills them in) are dropped."""
    if not isinstance(value, list):
        raise Unusable("malformed", f"{column} is {type(value).__name__}, not a list of messages")
    if not value:
        raise Unusable("empty", f"{column} has no messages")
    return [_message(message, f"{column}[{number}]") for number, message in enumerate(value)]


def _message(value: Any, place: str) -> Message:
    if not isinstance(value, dict):
        raise Unusable("malformed", f"{place} is {type(value).__name__}, not a message")
    message = {key: entry for key, entry in value.items() if entry is not None}
    if "role" not in message and "from" in message:  # ShareGPT
        speaker = message.pop("from")
        message = {"role": SHAREGPT_ROLES.get(speaker, speaker), "content": message.pop("value", None), **message}
    if not isinstance(message.get("role"), str):
        raise Unusable("malformed", f"{place} has no role")
    content = message.setdefault("content", "")
    if not isinstance(content, str | list):
        raise Unusable("malformed", f"{place} has content of type {type(content).__name__}")
    return message


def _string(row: dict[str, Any], column: str) -> str:
    value = row[column]
    if not isinstance(value, str | None):
        raise Unusable("malformed", f"{column} is {type(value).__name__}, not text")
    if not value or not value.strip():
        raise Unusable("empty", f"{column} is empty")
    return value


def _parsed(value: Any) -> Any:
    """Return a list that a csv or parquet file holds as JSON text as the list; anything else as it is."""
    if isinstance(value, str) and value.startswith("[{"):
        try:
            return json.loads(value)
        except json.JSONDecodeError:
            return value
    return value
