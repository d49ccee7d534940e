"""Chat templates: a conversation as text, and which of its characters the assistant wrote.

A template with `{% generation %}` markers says so itself. For any other, a turn is what the template adds when it
renders one message more after its own generation prompt. Templates that take something out of earlier turns (Qwen3
drops their reasoning) change the beginning of a turn once another follows, so the turn is looked up in the whole
conversation's text, and what is not found there exactly is an error, never a guess.
"""

import re
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from kdlm.data.forms import Message
from kdlm.data.report import Unusable

GENERATION = re.compile(r"{%-?\s*generation\s*-?%}")

Span = tuple[int, int]
"""First and one past the last character."""


def template_text(given: str | None) -> str | None:
    """Return the recipe's `chat_template`: itself, or the content of the `.jinja` file that it names."""
    if given is None or "{{" in given or "{%" in given:
        return given
    if not Path(given).expanduser().is_file():
        raise ValueError(f"data.chat_template: {given!r} is neither a file nor a Jinja template")
    return Path(given).expanduser().read_text(encoding="utf-8")


class ChatTemplate:
    """Renders conversations with the tokenizer's chat template, or another one.

    Raises ValueError when there is none.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str | None, variables: dict[str, Any]) -> None:
        if template is None and not tokenizer.chat_template:
            raise ValueError(
                f"chat data needs a chat template, and the tokenizer {tokenizer.name_or_path!r} has none: set "
                "data.chat_template to a .jinja file, or use an instruction-tuned model's tokenizer"
            )
        self.tokenizer = tokenizer
        self.template = template
        self.variables = {**tokenizer.special_tokens_map, **variables}
        self.control = tuple(str(token) for token in tokenizer.added_tokens_decoder.values())

    def render(self, messages: list[Message], tools: list[Any] | None, first: int = 0) -> tuple[str, list[Span]]:
        """Return a conversation's text and what the assistant wrote in it, from message `first` on.

        A span ends with the token that ends the turn, without the line break that templates put after it.
        Raises Unusable when the template refuses the conversation, ValueError when a turn cannot be told apart.
        """
        template = self.tokenizer.get_chat_template(self.template, tools)
        if GENERATION.search(template):
            full, spans = self._rendered(template, messages, tools, marked=True)
            begin = shared_length(self._text(template, messages[:first], tools), full) if first else 0
            return full, [(start, end) for start, end in spans if start >= begin]
        full = self._text(template, messages, tools)
        return full, list(self._turns(template, full, messages, tools, first))

    def text(self, messages: list[Message], tools: list[Any] | None) -> str:
        """Return a conversation's text."""
        return self._text(self.tokenizer.get_chat_template(self.template, tools), messages, tools)

    def _turns(self, template: str, full: str, messages: list[Message], tools: Any, first: int) -> Iterator[Span]:
        for index in range(first, len(messages)):
            if messages[index]["role"] == "assistant":
                if index == 0:
                    raise Unusable("malformed", "the conversation begins with an assistant turn")
                before = self._text(template, messages[:index], tools)
                opened = self._text(template, messages[:index], tools, prompt=True)
                done = self._text(template, messages[: index + 1], tools)
                content = messages[index]["content"]
                span = find_turn(full, before, opened, done, content if isinstance(content, str) else "")
                if span is None:
                    raise ValueError(
                        f"cannot tell which tokens the assistant wrote in message {index}: the chat template renders "
                        "that turn differently when other messages follow. Put {% generation %} markers into the "
                        "template (data.chat_template), or train on whole conversations with loss_on: all"
                    )
                start, end = span
                spoken = full[start:end].rstrip()
                yield start, start + len(spoken) if self.control and spoken.endswith(self.control) else end

    def _text(self, template: str, messages: list[Message], tools: Any, *, prompt: bool = False) -> str:
        return self._rendered(template, messages, tools, prompt=prompt)[0]

    def _rendered(
        self, template: str, messages: list[Message], tools: Any, *, prompt: bool = False, marked: bool = False
    ) -> tuple[str, list[Span]]:
        try:
            texts, spans = render_jinja_template(
                conversations=[messages],
                tools=tools,
                chat_template=template,
                add_generation_prompt=prompt,
                return_assistant_tokens_mask=marked,
                **self.variables,
            )
        except TemplateSyntaxError as error:
            raise ValueError(f"the chat template is not valid Jinja, line {error.lineno}: {error.message}") from error
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
            raise Unusable("refused by the chat template", str(error)) from error
        return texts[0], [(int(start), int(end)) for start, end in spans[0]] if marked else []


def shared_length(first: str, second: str) -> int:
    """Return how many characters two texts have in common at their beginning."""
    if second.startswith(first):
        return len(first)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))


def find_turn(full: str, before: str, opened: str, done: str, content: str) -> Span | None:
    """Return where one assistant turn is in `full`, or None when that is not certain.

    `before` is the text of the messages before the turn, `opened` the same with the generation prompt, `done` the
    text up to and with the turn.
    """
    shared = shared_length(opened, full)
    if not done.startswith(opened) or shared < len(before):
        return None
    body = done[len(opened) :]
    if shared < len(opened):
        # the generation prompt holds something (empty reasoning) that a turn loses once it is not the last
        start = full.find(body, len(before))
        return (start, start + len(body)) if body and 0 <= start <= shared else None
    start = len(opened)
    ending = content.strip()[-16:]
    for cut in range(len(body)):  # 0 unless the turn lost its beginning
        if full.startswith(body[cut:], start) and ending in body[cut:]:
            end = start + len(body) - cut
            spoken = full.find(content.strip(), start, end)
            # without a generation prompt the header of the turn is in the body, and the assistant did not write it
            return (spoken, end) if opened == before and spoken > 0 else (start, end)
    return None
