"""Encoding: rows of text into sequences of token ids and labels.

Labels are the ids themselves where a token is trained on, else IGNORE_INDEX; unshifted; the first token of a sequence
has nothing before it to be predicted from, and so is never trained on.

A prompt is always tokenised as it will be when the student is asked: where prompt and completion tokenised together
would merge across their border, the two are tokenised apart. Plain text that is too long is split into consecutive
pieces that share one token, so that every token but the text's first is trained on exactly once.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from kdlm.data.chat import ChatTemplate, Span, template_text
from kdlm.data.contexts import answer_start
from kdlm.data.files import Row
from kdlm.data.forms import (
    SIDES,
    Form,
    read_asked,
    read_chat,
    read_completion,
    read_domain,
    read_preference,
    read_prompt,
    read_reference,
    read_score,
    read_text,
    read_tools,
    read_weight,
)
from kdlm.data.report import Unusable
from kdlm.data.sections import DataSection
from kdlm.signal import IGNORE_INDEX

LOSS_ON = {
    "chat": ("assistant", "all"),
    "completion": ("completion", "all"),
    "preference": ("completion",),
    "text": ("all",),
    "prompt": (),
}
"""What the loss may be on, for each form; `auto` is the first."""


@dataclass(frozen=True)
class Sequence:
    """Token ids and labels, of the same length; and what a row has beside them, by column."""

    ids: list[int]
    labels: list[int]
    beside: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Encoded:
    """The sequences that one row became, whether it was cut at max_length, and whether a chat template wrote it."""

    sequences: list[Sequence]
    truncated: bool = False
    rendered: bool = False

    @property
    def trained(self) -> int:
        """The number of tokens that are trained on."""
        return sum(label != IGNORE_INDEX for sequence in self.sequences for label in sequence.labels)


@dataclass(frozen=True)
class Chat:
    """A rendered conversation and the characters of it that are trained on."""

    text: str
    spans: list[Span]


@dataclass(frozen=True)
class Prompt:
    """What the student is to complete; text that a template rendered has its special tokens."""

    text: str
    rendered: bool


@dataclass(frozen=True)
class Pair:
    """A prompt and its completion, both plain text."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Preference:
    """The completion that is to be preferred, and the other one, each after the prompt of both."""

    chosen: Chat | Pair
    rejected: Chat | Pair


class Encoder:
    """Encodes rows of one form, a batch at a time; ValueError when tokenizer or settings do not fit the form."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, section: DataSection, form: Form) -> None:
        allowed = LOSS_ON[form.name]
        if section.loss_on not in ("auto", *allowed):
            raise ValueError(
                f"loss_on: {section.loss_on} does not fit {form.name} data: use {' or '.join((*allowed, 'auto'))}"
            )
        if form.name == "preference" and section.packing == "pack":
            raise ValueError("packing: the sides of a preference stay together: use none or padding_free")
        if form.name == "preference" and section.context is not None:
            raise ValueError("context: nobody is told more of a preference: remove it")
        if form.name == "chat":
            _ = self._template_for(tokenizer, section)  # refused before any row is read
        elif tokenizer.eos_token_id is None:
            raise ValueError(f"{form.name} data is ended by an end-of-sequence token: the tokenizer has no eos_token")
        if form.name != "text" and not tokenizer.is_fast:
            raise ValueError("chat and completion data need a fast tokenizer (one with a tokenizer.json)")
        self.tokenizer, self.section, self.form = tokenizer, section, form
        self.leading = leading_tokens(tokenizer)
        self.eos: Any = tokenizer.eos_token_id

    @staticmethod
    def _template_for(tokenizer: PreTrainedTokenizerBase, section: DataSection) -> ChatTemplate:
        return ChatTemplate(tokenizer, template_text(section.chat_template), section.chat_template_args)

    @cached_property
    def template(self) -> ChatTemplate:
        return self._template_for(self.tokenizer, self.section)

    def __call__(self, rows: list[Row]) -> list[Encoded | Unusable]:
        """Return what became of each row."""
        prepared = [self._prepare(place, row) for place, row in rows]
        return self._encoded(prepared)

    def _encoded(self, prepared: list[Any]) -> list[Encoded | Unusable]:
        results: dict[int, Encoded | Unusable] = {i: one for i, one in enumerate(prepared) if isinstance(one, Unusable)}
        encoders: dict[type, Callable[[list[Any]], list[Encoded | Unusable]]] = {
            Chat: self._chats,
            Pair: self._pairs,
            Preference: self._preferences,
            Prompt: self._prompts,
            str: self._texts,
        }
        for kind, encode in encoders.items():
            chosen = [i for i, one in enumerate(prepared) if isinstance(one, kind)]
            if chosen:  # one call of the tokenizer for the whole batch, which it spreads over the cores
                results.update(zip(chosen, encode([prepared[i] for i in chosen]), strict=True))
        return [results[i] for i in range(len(prepared))]

    def _prepare(self, place: str, row: dict[str, Any]) -> Chat | Pair | Preference | Prompt | str | Unusable:
        try:
            missing = [theirs for theirs in self.form.columns.values() if theirs not in row]
            if missing and missing != [self.form.columns.get("tools")]:
                raise Unusable("malformed", f"no column {missing[0]!r}")
            values = {ours: row.get(theirs) for ours, theirs in self.form.columns.items()}
            if "domain" in values:
                read_domain(values)  # a row that names none is not used
            if "reference" in values:
                read_reference(values)
            if "weight" in values:
                read_weight(values)
            if "score" in values:
                read_score(values)
            if self.section.context is not None:
                read_asked(self.form, values)
            if self.form.name == "text":
                return read_text(values)
            if self.form.name == "chat":
                return self._chat(read_chat(values), read_tools(values))
            if self.form.name == "prompt":
                given, tools = read_prompt(values), read_tools(values)
                return Prompt(given, False) if isinstance(given, str) else Prompt(self._asked(given, tools), True)
            if self.form.name == "preference":
                return Preference(*(self._completion(*side, read_tools(values)) for side in read_preference(values)))
            return self._completion(*read_completion(values), read_tools(values))
        except Unusable as reason:
            return reason
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error

    def _completion(self, prompt: Any, completion: Any, tools: Any) -> Chat | Pair:
        if isinstance(prompt, str) and isinstance(completion, str):
            return Pair(prompt, completion)
        return self._chat([*prompt, *completion], tools, first=len(prompt))

    def _chat(self, messages: Any, tools: Any, first: int = 0) -> Chat:
        if self.section.loss_on == "all":
            text = self.template.text(messages, tools)
            return Chat(text, [(0, len(text))])
        return Chat(*self.template.render(messages, tools, first))

    def _asked(self, messages: Any, tools: Any) -> str:
        return self.template.text(messages, tools, prompt=True)

    def _tokens(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]

    def _chats(self, chats: list[Chat]) -> list[Encoded | Unusable]:
        tokens = self.tokenizer(
            [chat.text for chat in chats], add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        return [
            self._fitted(ids, trained_tokens(offsets, chat.spans), rendered=True)
            for chat, ids, offsets in zip(chats, tokens["input_ids"], tokens["offset_mapping"], strict=True)
        ]

    def _pairs(self, pairs: list[Pair]) -> list[Encoded | Unusable]:
        prompts = self._tokens([pair.prompt for pair in pairs])
        joined = self._tokens([pair.prompt + pair.completion for pair in pairs])
        encoded = []
        for pair, prompt, whole in zip(pairs, prompts, joined, strict=True):
            if whole[: len(prompt)] != prompt:
                whole = prompt + self._tokens([pair.completion])[0]
            ids = self._ended(whole)
            first = 0 if self.section.loss_on == "all" else len(self.leading) + len(prompt)
            encoded.append(self._fitted(ids, np.arange(len(ids)) >= first))
        return encoded

    def _preferences(self, preferences: list[Preference]) -> list[Encoded | Unusable]:
        """Encode either side by itself, and lay the two end to end. Where one cannot be used, neither is."""
        sides = [self._encoded([getattr(one, name) for one in preferences]) for name in SIDES]
        return [_joined(*both) for both in zip(*sides, strict=True)]

    def _prompts(self, prompts: list[Prompt]) -> list[Encoded | Unusable]:
        encoded: list[Encoded | Unusable] = []
        for prompt, tokens in zip(prompts, self._tokens([prompt.text for prompt in prompts]), strict=True):
            ids = tokens if prompt.rendered else [*self.leading, *tokens]
            if len(ids) > self.section.max_length:  # cut at its end it would ask something else
                encoded.append(Unusable("too long", f"{len(ids)} tokens, max_length is {self.section.max_length}"))
            else:
                encoded.append(Encoded([Sequence(ids, [IGNORE_INDEX] * len(ids))], rendered=prompt.rendered))
        return encoded

    def documents(self, rows: list[Row]) -> list[list[int] | Unusable]:
        """Return all tokens of each row of plain text, however long it is."""
        prepared: list[Any] = [self._prepare(place, row) for place, row in rows]
        texts = [text for text in prepared if isinstance(text, str)]
        tokens = iter(self._tokens(texts) if texts else [])
        return [self._ended(next(tokens)) if isinstance(one, str) else one for one in prepared]

    def _texts(self, texts: list[str]) -> list[Encoded | Unusable]:
        size = self.section.max_length
        encoded: list[Encoded | Unusable] = []
        for ids in map(self._ended, self._tokens(texts)):
            pieces = [ids[start : start + size] for start in range(0, len(ids) - 1, size - 1)]
            encoded.append(Encoded([Sequence(piece, [IGNORE_INDEX, *piece[1:]]) for piece in pieces]))
        return encoded

    def _ended(self, ids: list[int]) -> list[int]:
        eos = self.eos
        return [*self.leading, *ids] if ids and ids[-1] == eos else [*self.leading, *ids, eos]

    def _fitted(self, ids: list[int], trained: np.ndarray, *, rendered: bool = False) -> Encoded | Unusable:
        size = self.section.max_length
        truncated = len(ids) > size
        if truncated and self.section.truncation == "drop":
            return Unusable("too long", f"{len(ids)} tokens, max_length is {size}")
        labels = [token if kept else IGNORE_INDEX for token, kept in zip(ids[:size], trained[:size], strict=True)]
        labels[:1] = [IGNORE_INDEX]
        if all(label == IGNORE_INDEX for label in labels):
            return Unusable("no trained token", f"in the first {size} tokens" if truncated else "")
        answer = answer_start(np.where(trained, 0, IGNORE_INDEX).tolist()) if self.section.context else 0
        if answer >= size:
            return Unusable("too long", f"the last answer begins after {answer} tokens, max_length is {size}")
        return Encoded([Sequence(ids[:size], labels)], truncated, rendered)


def _joined(chosen: Encoded | Unusable, rejected: Encoded | Unusable) -> Encoded | Unusable:
    """Return both sides of a preference as one row: `seq_lengths` tells them apart, `rejected` says which is which."""
    for name, side in zip(SIDES, (chosen, rejected), strict=True):
        if isinstance(side, Unusable):
            return Unusable(side.reason, f"{name}: {side.detail}" if side.detail else name)
    assert isinstance(chosen, Encoded) and isinstance(rejected, Encoded)
    (one,), (other,) = chosen.sequences, rejected.sequences
    beside = {"seq_lengths": [len(one.ids), len(other.ids)], "rejected": [0, 1]}
    row = Sequence([*one.ids, *other.ids], [*one.labels, *other.labels], beside)
    return Encoded([row], chosen.truncated or rejected.truncated, chosen.rendered)


def trained_tokens(offsets: list[tuple[int, int]] | list[list[int]], spans: list[Span]) -> np.ndarray:
    """Return which tokens hold any text of a span, as `return_assistant_tokens_mask` of transformers does."""
    begins, ends = np.asarray(offsets, dtype=np.int64).reshape(-1, 2).T
    trained = np.zeros(len(begins), dtype=bool)
    for start, end in spans:
        trained |= (begins < end) & (ends > start) & (ends > begins)
    return trained


def leading_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return what the tokenizer puts before a text of its own accord, such as the BOS token of Llama."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    special = tokenizer("a")["input_ids"]
    for start in range(len(special) - len(plain) + 1):
        if special[start : start + len(plain)] == plain:
            return list(special[:start])
    return []
