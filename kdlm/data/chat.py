"""Chat templates: a conversation as text, and which of its characters the assistant wrote.

A template with `{% generation %}` markers says so itself. For any other, a turn is what the template adds when it
renders one message more after its own generation prompt. Many templates render a turn differently once another
follows: Qwen3 drops its reasoning, DeepSeek-R1 opens reasoning in the prompt that no turn has, Phi-3 ends every text
with a token of its own. Their turns are found by rendering the conversation again with two marks around what the
assistant said. What neither way finds for certain is an error, never a guess.
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
BEGIN, END = "\ue0b1", "\ue0b2"  # marks: of a private use area, so that no template and hardly any text knows them

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

    def text(self, messages: list[Message], tools: list[Any] | None, *, prompt: bool = False) -> str:
        """Return a conversation's text; `prompt` adds what opens the assistant's next turn."""
        return self._text(self.tokenizer.get_chat_template(self.template, tools), messages, tools, prompt=prompt)

    def _turns(self, template: str, full: str, messages: list[Message], tools: Any, first: int) -> Iterator[Span]:
        for index in range(first, len(messages)):
            if messages[index]["role"] == "assistant":
                if index == 0:
                    raise Unusable("malformed", "the conversation begins with an assistant turn")
                span = self._turn(template, full, messages, index, tools)
                if span is None:
                    raise ValueError(
                        f"cannot tell which tokens the assistant wrote in message {index}: the chat template renders "
                        "that turn differently when other messages follow. Put {% generation %} markers into the "
                        "template (data.chat_template), or train on whole conversations with loss_on: all"
                    )
                start, end = span
                spoken = full[start:end].rstrip()
                yield start, start + len(spoken) if self.control and spoken.endswith(self.control) else end

    def _turn(self, template: str, full: str, messages: list[Message], index: int, tools: Any) -> Span | None:
        content = messages[index]["content"]
        text = content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
        before = self._text(template, messages[:index], tools)
        opened = self._text(template, messages[:index], tools, prompt=True)
        done = self._text(template, messages[: index + 1], tools)
        # without a generation prompt, the header of the turn is in what the turn adds, and only marks tell them apart
        found = find_turn(full, opened, done, text) if opened != before or not text else None
        if found or not text.strip():
            return found
        said = text.rpartition("</think>")[2]  # what may be taken out of a turn is reasoning, never what follows it
        begin, end = len(text) - len(said.lstrip()), len(text.rstrip())
        marked: Any = f"{text[:begin]}{BEGIN}{text[begin:end]}{END}{text[end:]}"
        if not isinstance(content, str):
            marked = [{"type": "text", "text": marked}]
        changed = [*messages[:index], {**messages[index], "content": marked}, *messages[index + 1 :]]
        whole, done = (self._text(template, some, tools) for some in (changed, changed[: index + 1]))
        return self._between_marks(full, before, opened, whole, done)

    def _between_marks(self, full: str, before: str, opened: str, whole: str, done: str) -> Span | None:
        """Return where the marked turn of `whole` is in `full`, which is the same text without the marks."""
        counts = {text.count(mark) for text in (whole, done) for mark in (BEGIN, END)}
        prompt = shared_length(opened, whole)
        if counts != {1} or whole.replace(BEGIN, "").replace(END, "") != full or prompt < shared_length(before, opened):
            return None
        begin, close = whole.index(BEGIN), whole.index(END)
        start = begin if opened == before else min(prompt, begin)
        tail, after = done[done.index(END) + 1 :], whole[close + 1 :]
        ended = shared_length(tail, after)
        if ended < len(tail):  # a text's own ending, not the turn's, or half a token that two endings share
            ended = max(
                (after.index(token) + len(token) for token in self.control if token in after[:ended]), default=0
            )
            if not ended:
                return None
        return start, close - 1 + ended  # one mark stood before

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


def find_turn(full: str, opened: str, done: str, content: str) -> Span | None:
    """Return where the turn that follows `opened` is in `full`, or None when that is not certain.

    `opened` is the text up to and with the generation prompt, `done` the text up to and with the turn.
    """
    if not (full.startswith(opened) and done.startswith(opened)):
        return None
    body, start, ending = done[len(opened) :], len(opened), content.strip()[-16:]
    for cut in range(len(body)):  # 0 unless the turn lost its beginning
        if full.startswith(body[cut:], start) and ending in body[cut:]:
            return start, start + len(body) - cut
    return None
