"""Prompts: what a model is asked for a row, and prompts that are written anew."""

from collections.abc import Mapping
from typing import Any

from kdlm.curation.rows import as_text
from kdlm.curation.step import as_prompt
from kdlm.curation.templates import columns_of, filled
from kdlm.data.report import Unusable
from kdlm.writers import Prompt

Messages = list[dict[str, Any]]


def asked_of(row: Mapping[str, Any], template: str, system: str | None, *, chat: bool = False) -> Prompt:
    """Return the prompt of a row as a model is asked: written by a template, with a system message before it.

    Text stays text unless it has a system message or is to be a `chat`; messages stay messages, and the last one is
    written by the template. Raises Unusable where a column that is needed is null, or a conversation has tools, or a
    second system message.
    """
    if not row["prompt"]:
        raise Unusable("no prompt", "its column 'prompt' is empty")
    prompt = as_prompt(row["prompt"])
    if isinstance(prompt, str) and system is None and not chat:
        return _written(template, row)
    if not isinstance(prompt, str) and row.get("tools"):
        raise Unusable("tools", "a writer is told of no tools: drop the column `tools` to ask without them")
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    before = [] if system is None else [{"role": "system", "content": system}]
    if before and messages[0]["role"] == "system":
        raise Unusable("two system messages", "the conversation has one, and `system` says another")
    return [*before, *_with_last(messages, template, row)]


def prompt_of(row: Mapping[str, Any], template: str) -> str:
    """Return a new prompt of a row, as its column holds it: a conversation stays one, and its last message is written
    by the template. Raises Unusable as `asked_of`.
    """
    prompt = as_prompt(row.get("prompt") or "")
    if isinstance(prompt, str):
        return _written(template, row)
    return as_text(_with_last(prompt, template, row))


def last_said(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a row as templates read it: its `prompt` is the text, or the last message of the conversation."""
    prompt = as_prompt(row.get("prompt") or "")
    return row if isinstance(prompt, str) else {**row, "prompt": prompt[-1]["content"]}


def _with_last(messages: Messages, template: str, row: Mapping[str, Any]) -> Messages:
    if template == "{prompt}":
        return messages
    last = messages[-1]
    if not isinstance(last["content"], str):
        raise Unusable("no text in the last message", "and the template is written around that")
    return [*messages[:-1], {**last, "content": _written(template, {**row, "prompt": last["content"]})}]


def _written(template: str, row: Mapping[str, Any]) -> str:
    if (text := filled(template, row)) is None:
        null = next(name for name in columns_of(template) if row[name] is None)
        raise Unusable(f"no {null}", f"its column {null!r} is null, and the prompt has {{{null}}}")
    return text
