"""The writer `openai`: any server with OpenAI's API, vLLM's among them."""

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import accumulate
from typing import Any, ClassVar, Literal

from pydantic import Field

from kdlm.remote import Remote, ServerRefused, ServerUnavailable
from kdlm.server_options import ServerOptions
from kdlm.writers.scoring import Scored
from kdlm.writers.writer import Answered, Asked, Prompt, Refused, Text, WriterSection, begun

CANNOT = frozenset({400, 413, 422})
"""Statuses that are about one request, and not about all."""
TOKEN_BYTES = 1024
"""More than a server says of one token."""
CONTINUED = {"add_generation_prompt": False, "continue_final_message": True}
"""How vLLM and SGLang are asked to go on with the assistant's last message; OpenAI itself refuses these keys."""
STOPS: dict[str, Literal["end", "length"]] = {"stop": "end", "length": "length"}


class OpenAIWriter:
    """Asks a server, `concurrency` prompts at a time: text by `/v1/completions`, messages by `/v1/chat/completions`.

    Args:
        remote: asks the server.
        model: the name that the server knows the model by.
        extra: keys added to every request.
    """

    at_once = 1

    def __init__(self, remote: Remote, model: str, revision: str | None, extra: dict[str, Any]):
        self.remote, self.model, self.revision, self.extra = remote, model, revision, extra

    def write(self, asked: Sequence[Asked]) -> Iterator[tuple[int, Answered | Refused]]:
        yield from self.remote.as_answered([partial(self._one, one) for one in asked])

    def score(self, pairs: Sequence[tuple[Prompt, str]]) -> Iterator[tuple[int, Scored | Refused]]:
        yield from self.remote.as_answered([partial(self._scored, *pair) for pair in pairs])

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
        continued = not isinstance(asked.prompt, str) and bool(begun(asked.prompt)[1])
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
            **(CONTINUED if continued else {}),
            **self.extra,
        }
        limit = 1 << 20 | sampling.samples_per_prompt * sampling.max_new_tokens * TOKEN_BYTES
        try:
            answer = self.remote.json("POST", path, data=data, limit=limit)
        except ServerRefused as error:
            if error.status in CANNOT:
                return Refused(str(error))
            raise
        try:
            choices = sorted(answer["choices"], key=lambda choice: choice["index"])
            texts = [_text(choice, asked.log_probs, chat) for choice in choices]
            used = answer["usage"]
            if len(texts) == 1:
                texts = [Text(texts[0].text, texts[0].stop, int(used["completion_tokens"]), texts[0].log_probs)]
            return Answered(texts, int(used["prompt_tokens"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ServerUnavailable(f"{self.remote.endpoint}{path}: not an answer as expected ({error!r})") from error


def _text(choice: dict[str, Any], logged: bool, chat: bool) -> Text:
    text = choice["message"]["content"] if chat else choice["text"]
    values = None
    if logged:
        said = choice["logprobs"]
        values = (
            [float(one["logprob"]) for one in said["content"]] if chat else list(map(float, said["token_logprobs"]))
        )
    stop = STOPS[choice["finish_reason"]]
    return Text(text or "", stop, 0 if values is None else len(values), values)


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
    """Added to every request: {min_p: 0.05, chat_template_kwargs: {enable_thinking: true}}."""

    def identity(self) -> dict[str, Any]:
        return {"model": self.model, "revision": self.revision, "extra": self.extra}

    def open(self, place: str) -> OpenAIWriter:
        return OpenAIWriter(self.remote(place=f"{place}.url"), self.model, self.revision, self.extra)
