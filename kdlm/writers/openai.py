"""The writer `openai`: any server with OpenAI's API, vLLM's among them."""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import accumulate
from typing import Any, ClassVar, Literal

from pydantic import Field

from kdlm.remote import Remote, ServerRefused, ServerUnavailable
from kdlm.server_options import ServerOptions
from kdlm.writers.pace import Pace
from kdlm.writers.scoring import Scored
from kdlm.writers.writer import Answered, Asked, Prices, Prompt, Refused, Text, WriterSection, begun

CANNOT = frozenset({400, 413, 422})
"""Statuses that are about one request, and not about all."""
TOKEN_BYTES = 1024
"""More than a server says of one token."""
CONTINUED = {"add_generation_prompt": False, "continue_final_message": True}
"""How vLLM and SGLang are asked to go on with the assistant's last message; OpenAI itself refuses these keys."""
STOPS: dict[str, Literal["end", "length"]] = {"stop": "end", "length": "length"}
WITHOUT_TEXT = {
    "content_filter": "completion held back by the server's content filter",
    "tool_calls": "tool call instead of a text",
    "function_call": "tool call instead of a text",
}
THOUGHT = "<think>\n{}\n</think>\n\n"
"""How a thought that a server gives apart from its answer is written before it."""


class OpenAIWriter:
    """Asks a server, `concurrency` requests at a time: text by `/v1/completions`, messages by `/v1/chat/completions`.

    Args:
        remote: asks the server.
        section: what is said of the model.
    """

    at_once = 1

    def __init__(self, remote: Remote, section: "OpenAISection"):
        self.remote, self.model, self.revision = remote, section.model, section.revision
        self.choices, self.extra = section.choices, section.extra
        self.pace = Pace(section.requests_per_minute, section.tokens_per_minute)

    def write(self, asked: Iterable[Asked]) -> Iterator[tuple[int, Answered | Refused]]:
        yield from self.remote.as_answered(partial(self._one, one) for one in asked)

    def score(self, pairs: Sequence[tuple[Prompt, str]]) -> Iterator[tuple[int, Scored | Refused]]:
        yield from self.remote.as_answered(partial(self._scored, *pair) for pair in pairs)

    def close(self) -> None:
        self.remote.close()

    def _scored(self, prompt: Prompt, completion: str) -> Scored | Refused:
        """Have the server echo a text with its log-probabilities, as vLLM does."""
        if not isinstance(prompt, str):
            return Refused("a conversation: a server echoes plain text alone, score conversations with a local model")
        data = {"model": self.model, "prompt": prompt + completion, "max_tokens": 1, "temperature": 0, **self.extra}
        data |= {"echo": True, "logprobs": 0}
        limit = 1 << 20 | len(data["prompt"]) * TOKEN_BYTES
        try:
            answer = self.remote.json("POST", "/v1/completions", data=data, limit=limit)
        except ServerRefused as error:
            if error.status in CANNOT:
                return Refused(str(error))
            raise
        try:
            said, count = answer["choices"][0]["logprobs"], int(answer["usage"]["prompt_tokens"])
            return _after(said["tokens"][:count], said["token_logprobs"][:count], completion)
        except (KeyError, TypeError, ValueError) as error:
            place = f"{self.remote.endpoint}/v1/completions"
            raise ServerUnavailable(f"{place}: no echo with log-probabilities as expected ({error!r})") from error

    def _one(self, asked: Asked) -> Answered | Refused:
        chat, sampling = not isinstance(asked.prompt, str), asked.sampling
        path = "/v1/chat/completions" if chat else "/v1/completions"
        most = sampling.samples_per_prompt * sampling.max_new_tokens
        seconds, booked = self.pace.begin(most)
        self.remote.rest(seconds)
        try:
            answer = self.remote.json("POST", path, data=self._data(asked, chat), limit=1 << 20 | most * TOKEN_BYTES)
        except ServerRefused as error:
            if error.status not in CANNOT:
                raise
            self.pace.end(booked, 0)
            return Refused(str(error))
        try:
            said = answered(answer, asked, chat)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ServerUnavailable(f"{self.remote.endpoint}{path}: not an answer as expected ({error!r})") from error
        self.pace.end(booked, said.prompt_tokens + said.written)
        return said if said.texts or not said.lost else said.lost[0]

    def _data(self, asked: Asked, chat: bool) -> dict[str, Any]:
        sampling = asked.sampling
        data = {
            "model": self.model,
            "messages" if chat else "prompt": asked.prompt,
            "n": sampling.samples_per_prompt,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_new_tokens,
            "seed": asked.seed,
            **({"top_k": sampling.top_k} if sampling.top_k else {}),
            **({"logprobs": True if chat else 0} if asked.log_probs else {}),
            **(CONTINUED if not isinstance(asked.prompt, str) and begun(asked.prompt)[1] else {}),
            **self.extra,
        }
        return {key: value for key, value in data.items() if value is not None}


def answered(answer: dict[str, Any], asked: Asked, chat: bool) -> Answered:
    """Return what a server's answer says. Raises KeyError, TypeError or ValueError where it is none."""
    choices = sorted(answer["choices"], key=lambda choice: choice["index"])[: asked.sampling.samples_per_prompt]
    used = answer.get("usage") or {}
    written, read = int(used.get("completion_tokens") or 0), int(used.get("prompt_tokens") or 0)
    texts, lost = [], []
    for choice in choices:
        if (reason := choice["finish_reason"]) in STOPS:
            texts.append(_text(choice, asked.log_probs, chat, written if len(choices) == 1 and used else None))
        elif reason in WITHOUT_TEXT:
            lost.append(Refused(f"finish_reason {reason}", WITHOUT_TEXT[reason]))
        # anything else was broken off (`abort`, `error`, null), and is asked for again
    return Answered(texts, read, tuple(lost), written if used else None)


def _text(choice: dict[str, Any], logged: bool, chat: bool, alone: int | None) -> Text:
    """Return a choice; its tokens are those with a log-probability or an id, else what a choice `alone` took."""
    stop, values = STOPS[choice["finish_reason"]], None
    if chat:
        text = choice["message"].get("content") or ""
        thought = choice["message"].get("reasoning_content") or choice["message"].get("reasoning")
        if thought and stop == "length" and not text:  # cut in its thoughts
            text = THOUGHT.partition("{}")[0] + thought
        elif thought:
            text = THOUGHT.format(thought.strip("\n")) + text.lstrip("\n")
    else:
        text = choice["text"]
    if logged:
        said = choice["logprobs"]
        values = [float(each["logprob"]) for each in said["content"]] if chat else [*map(float, said["token_logprobs"])]
    counted = values if values is not None else choice.get("token_ids")
    tokens = alone if counted is None else len(counted)
    return Text(text.encode(errors="replace").decode(), stop, tokens, values)


def _after(tokens: list[str], log_probs: list[float | None], completion: str) -> Scored | Refused:
    """Return what the tokens of a completion got, which are the last ones of a text."""
    starts = list(accumulate(map(len, tokens), initial=0))
    border = starts.pop() - len(completion)
    if not "".join(tokens).endswith(completion):
        return Refused("its tokens do not spell it, as with half a character each: score it with a local model")
    if border not in starts and completion:
        return Refused("a token goes over the border of prompt and completion: score it with a local model")
    first = starts.index(border) if completion else len(tokens)
    if first == 0:
        return Refused("no token before the completion: nothing predicts its first one")
    values = [float(value) for value in log_probs[first:] if value is not None]
    return Scored(values, [start - border for start in starts[first:]])


class OpenAISection(ServerOptions, WriterSection):
    """A model behind a server with OpenAI's API."""

    place: ClassVar[str] = "writers"

    name: Literal["openai"] = "openai"
    model: str
    """The name that the server knows the model by."""
    revision: str | None = None
    """What else tells this model from others of its name, for the provenance of its texts."""
    timeout: float = Field(600.0, gt=0)
    """Seconds that one try may take."""
    extra: dict[str, Any] = {}
    """Added to every request: {min_p: 0.05, chat_template_kwargs: {enable_thinking: true}}; null takes a key out of
    it: {max_tokens: null, max_completion_tokens: 4096}."""
    choices: int = Field(1, ge=1)
    """Completions that one request asks for. With 1 each has its own seed and token count; more of them share the
    reading of the prompt, and its price where the server has no cache."""
    requests_per_minute: float | None = Field(None, gt=0)
    """Requests are spaced so that no more go out."""
    tokens_per_minute: float | None = Field(None, gt=0)
    """Requests are spaced so that prompts and completions together come to no more, by the mean of the answers so
    far."""
    prices: Prices | None = None
    """What its tokens cost: {prompt: 0.15, completion: 0.6}. What was spent is then shown, and `generate` takes a
    `budget`."""

    def identity(self) -> dict[str, Any]:
        return {"model": self.model, "revision": self.revision, "extra": self.extra}

    @property
    def costs(self) -> Prices | None:
        return self.prices

    def open(self, place: str) -> OpenAIWriter:
        return OpenAIWriter(self.remote(place=f"{place}.url"), self)
