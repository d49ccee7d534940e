"""Prompts: what a model is asked for a row."""

from collections.abc import Mapping
from typing import Any

from kdlm.curation.step import as_prompt
from kdlm.curation.templates import columns_of, filled
from kdlm.data.report import Unusable
from kdlm.writers import Prompt


def asked_of(row: Mapping[str, Any], template: str, system: str | None, *, chat: bool = False) -> Prompt:
    """Return the prompt of a row as a model is asked: written by a template, with a system message before it.

    Text stays text unless it has a system message or is to be a `chat`; messages stay messages, and the last one is
    written by the template. Raises Unusable where a column that is needed is null.
    """
    if not row["prompt"]:
        raise Unusable("no prompt", "its column 'prompt' is empty")
    prompt = as_prompt(row["prompt"])
    if isinstance(prompt, str) and system is None and not chat:
        return _written(template, row)
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    last = messages[-1]
    if template != "{prompt}":
        if not isinstance(last.get("content"), str):
            raise Unusable("no text in the last message", "and the template is written around that")
        last = {**last, "content": _written(template, {**row, "prompt": last["content"]})}
    before = [] if system is None else [{"role": "system", "content": system}]
    return [*before, *messages[:-1], last]


def _written(template: str, row: Mapping[str, Any]) -> str:
    if (text := filled(template, row)) is None:
        null = next(name for name in columns_of(template) if row[name] is None)
        raise Unusable(f"no {null}", f"its column {null!r} is null, and the prompt has {{{null}}}")
    return text
