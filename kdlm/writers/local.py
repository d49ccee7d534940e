"""The writer `local`: a model of this machine, by transformers, in this process."""

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from pydantic import Field

from kdlm.data.chat import ChatTemplate
from kdlm.data.encoding import leading_tokens
from kdlm.models import Loading, device_of, named
from kdlm.rollouts import Completion, GenerateSection, context_of
from kdlm.writers.scoring import LocalScorer, Scored, tokenised
from kdlm.writers.writer import Answered, Asked, Prompt, Refused, Text, WriterSection, begun


class LocalWriter:
    """Draws with transformers' own generation: slow, and on any device.

    Requests are answered `at_once` at a time: which prompts share a batch decides, in the last bits, what is drawn.
    """

    def __init__(self, model: Any, tokenizer: Any, about: tuple[str, str | None], section: "LocalSection"):
        self.model, self.revision = about
        self.tokenizer, self.at_once = tokenizer, section.batch_size
        self.leading = leading_tokens(tokenizer)
        self.context = context_of(model)
        self.template_args = section.chat_template_args
        self.network, self.batch_tokens = model, section.batch_tokens
        self.engine = GenerateSection(batch_size=section.batch_size).build(model, tokenizer, model.device, copied=False)
        self.engine.take(model, 0)

    def write(self, asked: Sequence[Asked]) -> Iterator[tuple[int, Answered | Refused]]:
        for start in range(0, len(asked), self.at_once):
            yield from self._some(range(start, min(start + self.at_once, len(asked))), asked)

    def score(self, pairs: Sequence[tuple[Prompt, str]]) -> Iterator[tuple[int, Scored | Refused]]:
        read = [tokenised(self.tokenizer, *self._read(prompt), completion) for prompt, completion in pairs]
        yield from LocalScorer(self.network, self.context, self.batch_tokens).score(read)

    def close(self) -> None:
        self.engine.close()

    def _some(self, places: range, asked: Sequence[Asked]) -> Iterator[tuple[int, Answered | Refused]]:
        """Answer requests, those of one sampling together."""
        prompts = {place: self._ids(asked[place].prompt) for place in places}
        for place in [place for place, ids in prompts.items() if len(ids) >= self.context]:
            yield place, Refused(f"{len(prompts.pop(place))} tokens, and the model reads {self.context}")
        for sampling in dict.fromkeys(asked[place].sampling for place in prompts):
            same = [place for place in prompts if asked[place].sampling == sampling]
            drawn = self.engine.generate([prompts[place] for place in same], sampling, asked[same[0]].seed)
            texts = self.tokenizer.batch_decode([one.ids for one in drawn], skip_special_tokens=True)
            for number, place in enumerate(same):
                mine = [(one, text) for one, text in zip(drawn, texts, strict=True) if one.group == number]
                written = [_text(one, text, asked[place].log_probs) for one, text in mine]
                yield place, Answered(written, len(prompts[place]))

    def _ids(self, prompt: Prompt) -> list[int]:
        leading, text = self._read(prompt)
        return [*leading, *self.tokenizer(text, add_special_tokens=False)["input_ids"]]

    def _read(self, prompt: Prompt) -> tuple[list[int], str]:
        """Return a prompt as text, and the tokens that go before it; a template writes its own."""
        if isinstance(prompt, str):
            return self.leading, prompt
        messages, beginning = begun(prompt)
        return [], ChatTemplate(self.tokenizer, None, self.template_args).text(messages, None, prompt=True) + beginning


def _text(completion: Completion, text: str, logged: bool) -> Text:
    return Text(text, completion.stop, len(completion.ids), completion.log_probs if logged else None)


class LocalSection(Loading, WriterSection):
    """A model of this machine, by transformers, in this process."""

    name: Literal["local"] = "local"
    path: str
    """Hub id, folder (`runs/quickstart/forward-kl-0/student`), or `sandbox:code-teacher`."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    device: str = "auto"
    """`cuda:1`, `cpu`, or `auto`: a GPU where there is one."""
    batch_size: int = Field(64, ge=1)
    """Requests answered together."""
    batch_tokens: int = Field(8192, ge=1)
    """Tokens scored together, padding among them."""
    chat_template_args: dict[str, Any] = {}
    """Variables for the chat template, e.g. `{enable_thinking: false}`."""

    def identity(self) -> dict[str, Any]:
        return self.model_dump(mode="json", exclude={"name", "device", "batch_tokens"})

    def open(self, place: str) -> LocalWriter:
        options = {key: getattr(self, key) for key in Loading.model_fields}
        try:
            source: Any = named(self.path, **options, **({} if self.revision is None else {"revision": self.revision}))
            device = device_of(self.device)
            model = source.load(**({} if self.quantization == "none" else {"device_map": {"": device}}))
            tokenizer = source.tokenizer()
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
        model = model.eval() if self.quantization != "none" else model.to(torch.device(device)).eval()
        return LocalWriter(model, tokenizer, (self.path, self.revision), self)
