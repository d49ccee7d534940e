"""Speculative decoding by transformers' assisted generation, with a record of every block.

A block is one forward pass of the target: the draft proposed some tokens, the target kept the first of them and added
one of its own (Leviathan et al. 2023, arXiv 2211.17192, algorithm 1). transformers says neither what was proposed nor
how much of it was kept, so both are read off from outside: the proposals from what the target's forward is given, the
outcome from what the streamer is handed.

What transformers would do on its own, and is switched off here: stop the draft where it is unsure (its threshold of
0.4 moves during the run), draft 20 tokens, and take `top_k`, `repetition_penalty` and the like from the folders of the
models. It reads the number of drafted tokens and the threshold from the draft's generation config alone; the same
words given to `generate` change nothing (5.23).
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging

from kdlm.models.prediction import LanguageModel, plain

SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class Block:
    """One forward pass of the target.

    Attributes:
        proposed: the draft's tokens: fewer than were asked for where the draft ended the text, or its length did.
        emitted: the tokens that the text grew by: the proposals that were kept, then one of the target's own unless
            the text ended before.
    """

    proposed: tuple[int, ...]
    emitted: tuple[int, ...]

    @property
    def accepted(self) -> int:
        """Proposals that were kept. Exact: after a refusal, the target's own token is never the one refused."""
        kept = takewhile(lambda pair: pair[0] == pair[1], zip(self.proposed, self.emitted, strict=False))
        return sum(1 for _ in kept)

    @property
    def tested(self) -> int:
        """Proposals that were up: those that were kept, and the one that was refused."""
        return min(self.accepted + 1, len(self.proposed))


@dataclass(frozen=True)
class Decoded:
    """A text that target and draft wrote.

    Attributes:
        ids: its new tokens, without the prompt.
        blocks: how they came about, in order.
    """

    ids: list[int]
    blocks: list[Block]


class Decoder:
    """Writes texts with a target, with or without its draft. `decoding` makes one."""

    def __init__(self, target: LanguageModel, draft: LanguageModel, temperature: float) -> None:
        self.target, self.draft, self.temperature = target, draft, temperature

    def speculative(self, prompt: Sequence[int], max_new_tokens: int) -> Decoded:
        """Continue a prompt with the target, helped by the draft."""
        fed: list[Tensor] = []
        stream = _Stream()
        hook = self.target.register_forward_pre_hook(
            lambda module, args, kwargs: fed.append(kwargs["input_ids"]), with_kwargs=True
        )
        with hook:
            ids = self._generate(self.target, prompt, max_new_tokens, assistant_model=self.draft, streamer=stream)
        # The first pass reads the prompt, the later ones the token before the proposals, which no cache holds yet.
        known = [len(prompt)] + [1] * (len(fed) - 1)
        blocks = [
            Block(tuple(seen[0, n:].tolist()), emitted)
            for seen, n, emitted in zip(fed, known, stream.emitted, strict=True)
        ]
        return Decoded(ids, blocks)

    def alone(self, model: LanguageModel, prompt: Sequence[int], max_new_tokens: int) -> list[int]:
        """Continue a prompt with one of the two models by itself and return the new tokens."""
        return self._generate(model, prompt, max_new_tokens)

    def _generate(self, model: LanguageModel, prompt: Sequence[int], max_new_tokens: int, **options: Any) -> list[int]:
        ids = torch.tensor([list(prompt)], device=model.device)
        law: dict[str, Any] = {"do_sample": False}
        if self.temperature > 0:  # top_k 0: by default transformers cuts to 50 tokens
            law = {"do_sample": True, "temperature": self.temperature, "top_k": 0, "top_p": 1.0}
        settings = GenerationConfig(max_new_tokens=max_new_tokens, **law)
        mask = torch.ones_like(ids)
        return model.generate(ids, attention_mask=mask, generation_config=settings, **options)[
            0, len(prompt) :
        ].tolist()


@contextmanager
def decoding(
    target: LanguageModel, draft: LanguageModel, *, drafted: int = 5, temperature: float = 1.0
) -> Iterator[Decoder]:
    """Set two models up for speculative decoding, and leave them as they were.

    Args:
        target: the model whose text it is.
        draft: the model that proposes; of the same tokenizer. Heads of different size are cut to the ids both have.
        drafted: tokens that the draft proposes in a block (gamma).
        temperature: divides the logits of both; 0 takes the most probable token.

    Tokens are drawn from the whole softmax (no `top_k`, `top_p` or penalties), and a text ends at the end tokens of the
    target's generation config. Raises ValueError when both are one object, whose passes could not be told apart.
    """
    target, draft = plain(target), plain(draft)
    if draft is target:
        raise ValueError("target and draft are one object: load the model twice to measure it against itself")
    ends = {key: getattr(target.generation_config, key) for key in SPECIAL_TOKENS}
    if ends["pad_token_id"] is None and ends["eos_token_id"] is not None:  # never seen: one text at a time
        eos = ends["eos_token_id"]
        ends["pad_token_id"] = eos[0] if isinstance(eos, list) else eos
    drafting = {
        "num_assistant_tokens": drafted,
        "num_assistant_tokens_schedule": "constant",
        "assistant_confidence_threshold": 0.0,
    }
    with ExitStack() as undo:
        undo.enter_context(_quiet())
        undo.enter_context(_same_size(target, draft))
        for model, settings in ((target, ends), (draft, ends | drafting)):
            undo.callback(setattr, model, "generation_config", model.generation_config)
            undo.callback(model.train, model.training)
            model.generation_config = GenerationConfig(**settings)
            model.eval()
        yield Decoder(target, draft, temperature)


@contextmanager
def _same_size(target: LanguageModel, draft: LanguageModel) -> Iterator[None]:
    """Cut the logits of both to the shorter head: heads of one tokenizer are padded to different sizes.

    transformers takes heads of different size for different tokenizers, so the configs have to agree as well.
    """
    sizes = {model: model.config.get_text_config().vocab_size for model in (target, draft)}
    shared = min(sizes.values())
    with ExitStack() as undo:
        for model in (target, draft):
            if sizes[model] > shared:
                undo.callback(setattr, model.config.get_text_config(), "vocab_size", sizes[model])
                model.config.get_text_config().vocab_size = shared
                undo.enter_context(model.register_forward_hook(_cut_to(shared)))
        yield


def _cut_to(size: int) -> Any:
    def cut(module: Any, args: Any, output: Any) -> Any:
        output.logits = output.logits[..., :size]
        return output

    return cut


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from warning of what it does itself: the draft's settings, passed on in two ways at once."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


class _Stream(BaseStreamer):
    """Keeps what each block adds to the text."""

    def __init__(self) -> None:
        self.handed: list[tuple[int, ...]] = []

    def put(self, value: Tensor) -> None:
        self.handed.append(tuple(value.flatten().tolist()))

    def end(self) -> None: ...

    @property
    def emitted(self) -> list[tuple[int, ...]]:
        return self.handed[1:]  # the first thing that a streamer is handed is the prompt
