"""Turns: the tokens between a turn that the student ended and its next one, as plain text or by the chat template.

Plain text: a line break, the words, a line break; the end token that the student drew stays before them. In a chat it
is what the template writes after an assistant's turn: the end of it (drawn already), the words as a message, and the
next generation prompt. It is found by rendering a conversation, and a template that writes a turn differently once
others follow is refused: what the student has read and drawn would not be the text that it is asked with.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

from kdlm.data.chat import ChatTemplate, shared_length
from kdlm.data.report import Unusable

WORDS = "\ue0b3"  # stands for what is said: of a private use area, as the marks of chat.py
TURNS = ("Yes.", "<think>\nSo it is.\n</think>\n\nYes.")
"""Turns that a template is tried with: a plain one, and one with reasoning, which some take out of earlier turns."""


class Between:
    """What stands between two turns of the student.

    A prompt counts as a chat where it ends as the tokenizer's template ends a prompt.

    Args:
        tokenizer: the student's, fast.
        ends: the tokens at which its turns end.
        role: who speaks in a chat; `tool` is `user` where the template has none.
        variables: for the chat template.

    Attributes:
        opening: the tokens with which the template ends every prompt; empty without one.
    """

    def __init__(
        self,
        tokenizer: Any,
        ends: Collection[int],
        role: Literal["user", "tool"] = "user",
        variables: Mapping[str, Any] | None = None,
    ):
        self.tokenizer, self.ends, self.role = tokenizer, ends, role
        self.special = sorted((str(token) for token in tokenizer.added_tokens_decoder.values()), key=len, reverse=True)
        self.template = ChatTemplate(tokenizer, None, dict(variables or {})) if tokenizer.chat_template else None
        self.opening = self._tokens(self._opened()) if self.template else []
        self._frame: tuple[str, str] | None = None

    def __call__(self, prompt: Sequence[int], words: str) -> list[int]:
        """Return the tokens from the end of a turn, its end token not among them, to the begin of the next.

        `words` lose what would be a special token. Raises ValueError, for a chat, where the template cannot be
        continued or its turns end with a token that does not end the student's.
        """
        for token in self.special:
            words = words.replace(token, "")
        if not self.is_chat(prompt):
            return self._tokens(f"\n{words}\n")
        if self._frame is None:
            self._frame = self._found()
        before, after = self._frame
        ids = self._tokens(f"{before}{words}{after}")
        if not ids or ids[0] not in self.ends:
            raise ValueError(
                f"rollouts.environment: the chat template ends a turn with {self.tokenizer.decode(ids[:1])!r}, where "
                "the student's turns do not end: name it in `eos_token_id` of the student's generation_config.json"
            )
        return ids[1:]

    def is_chat(self, prompt: Sequence[int]) -> bool:
        """Return whether a template wrote the prompt."""
        size = len(self.opening)
        return size > 0 and list(prompt[-size:]) == self.opening

    def _tokens(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def _opened(self) -> str:
        """Return how every prompt of the template ends, whatever is asked."""
        asked = [self._text([{"role": "user", "content": words}], prompt=True)[::-1] for words in ("Why?", "So")]
        return asked[0][: shared_length(*asked)][::-1]

    def _found(self) -> tuple[str, str]:
        """Return what the template writes between an assistant's words and the environment's, and after these."""
        frames = {self._between(turn, role) for role in self._roles() for turn in TURNS}
        frame = frames.pop() if len(frames) == 1 else None
        if frame is None:
            raise ValueError(
                "rollouts.environment: the chat template writes an earlier turn otherwise than the student has drawn "
                "it (reasoning that is taken out, most often), so that it cannot be continued: use another template "
                "(data.chat_template) or other `chat_template_args`"
            )
        return frame

    def _roles(self) -> list[str]:
        """Return who speaks: `tool` where the template writes down what a tool says."""
        if self.role == "tool":
            try:
                if self._text(_talk(TURNS[0], "tool")).count(WORDS) == 1:
                    return ["tool"]
            except Unusable:
                pass
        return ["user"]

    def _between(self, turn: str, role: str) -> tuple[str, str] | None:
        """Return the frame of the words after one turn; None where the template does not keep what stands before."""
        talk = _talk(turn, role)
        opened = self._text(talk[:1], prompt=True) + turn
        once, twice = self._text(talk, prompt=True), self._text([*talk, *talk[1:]], prompt=True)
        if not once.startswith(opened) or once.count(WORDS) != 1 or twice != once + turn + once[len(opened) :]:
            return None
        before, _, after = once[len(opened) :].partition(WORDS)
        return before, after

    def _text(self, messages: list[dict[str, Any]], *, prompt: bool = False) -> str:
        return self.template.text(messages, None, prompt=prompt)  # pyright: ignore[reportOptionalMemberAccess]


def _talk(turn: str, role: str) -> list[dict[str, Any]]:
    return [
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": turn},
        {"role": role, "content": WORDS},
    ]
