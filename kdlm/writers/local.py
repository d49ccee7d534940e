"""The writer `local`: a model of this machine, by transformers, in this process."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, Literal

import torch
from pydantic import Field

from kdlm.data.report import Unusable
from kdlm.models import Loading, device_of, named
from kdlm.rollouts import GenerateSection, context_of
from kdlm.writers.scoring import LocalScorer, Scored, Tokens, tokenised
from kdlm.writers.weights import Prompts, version_of
from kdlm.writers.writer import Answered, Asked, Prompt, Refused, Text, WriterSection


class LocalWriter:
    """Draws with transformers' own generation: slow, and on any device.

    Completions are drawn `at_once` at a time, by one generator: which share a batch decides what is drawn. A batch is
    of one sampling.
    """

    choices = 1

    def __init__(self, model: Any, tokenizer: Any, about: tuple[str, str | None], section: "LocalSection"):
        self.model, self.revision = about
        self.tokenizer, self.at_once = tokenizer, section.batch_size
        self.prompts = Prompts(tokenizer, section.chat_template_args)
        self.network, self.batch_tokens = model, section.batch_tokens
        self.context = context_of(model)
        self.engine = GenerateSection(batch_size=section.batch_size).build(model, tokenizer, model.device, copied=False)
        self.engine.take(model, 0)

    def write(self, asked: Iterable[Asked]) -> Iterator[tuple[int, Answered | Refused]]:
        numbered = enumerate(asked)
        while batch := list(islice(numbered, self.at_once)):
            yield from self._together(batch)

    def score(self, pairs: Sequence[tuple[Prompt, str]]) -> Iterator[tuple[int, Scored | Refused]]:
        read = dict(enumerate(map(self.tokens, pairs)))
        yield from ((place, one) for place, one in read.items() if isinstance(one, Refused))
        tokens = {place: one for place, one in read.items() if isinstance(one, Tokens)}
        places = list(tokens)
        yield from ((places[number], score) for number, score in self.scorer().score([*tokens.values()]))

    def tokens(self, pair: tuple[Prompt, str]) -> Tokens | Refused:
        """Return prompt and completion as the model reads them."""
        try:
            return tokenised(self.tokenizer, *self.prompts.read(pair[0]), pair[1])
        except Unusable as why:
            return Refused(str(why))

    def scorer(self) -> LocalScorer:
        """Return what reads text that the model did not write."""
        return LocalScorer(self.network, self.context, self.batch_tokens)

    def close(self) -> None:
        self.engine.close()

    def _together(self, batch: list[tuple[int, Asked]]) -> Iterator[tuple[int, Answered | Refused]]:
        prompts, refused = self.prompts.ids(batch, self.context)
        yield from refused.items()
        first = batch[0][1]
        drawn = self.engine.generate([*prompts.values()], first.sampling, first.seed) if prompts else []
        texts = self.tokenizer.batch_decode([one.ids for one in drawn], skip_special_tokens=True)
        for (place, ids), one, text in zip(prompts.items(), drawn, texts, strict=True):
            log_probs = one.log_probs if first.log_probs else None
            yield place, Answered([Text(text, one.stop, len(one.ids), log_probs)], len(ids), seed=first.seed)


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
    """Completions drawn together. With another number other texts are drawn."""
    batch_tokens: int = Field(8192, ge=1)
    """Tokens scored together, padding among them."""
    chat_template_args: dict[str, Any] = {}
    """Variables for the chat template, e.g. `{enable_thinking: false}`."""

    def identity(self) -> dict[str, Any]:
        said = self.model_dump(mode="json", exclude={"name", "device", "batch_tokens", "path", "revision"})
        return {"model": self.path, "revision": version_of(self.path, self.revision), **said}

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
        return LocalWriter(model, tokenizer, (self.path, version_of(self.path, self.revision)), self)
