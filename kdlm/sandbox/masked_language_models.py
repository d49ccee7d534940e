"""Masked language models of sums: the sums, the shape of the models, how they are trained and written."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kdlm.sandbox.jsonl import read_jsonl, write_jsonl
from kdlm.sandbox.language_models import Shape, no_bars, torch_release
from kdlm.sandbox.progress import Progress

MASK = "<mask>"


@dataclass(frozen=True)
class Sums:
    """All sums of two numbers below 100, all numbers of one width: `07+35=`, `042`; one in `held_out` is for eval."""

    held_out: int
    seed: int
    needs: tuple[str, ...] = ()

    def ingredients(self) -> dict[str, Any]:
        return asdict(self)

    def make(self, folder: Path, built: dict[str, Path], progress: Progress, name: str) -> dict[str, Any]:
        import random

        pairs = [(a, b) for a in range(100) for b in range(100)]
        random.Random(self.seed).shuffle(pairs)
        count = len(pairs) // self.held_out
        splits = {"train": pairs[count:], "eval": pairs[:count]}
        for split, chosen in splits.items():
            write_jsonl(folder / f"{split}.jsonl", self._rows(chosen))
        return {split: len(chosen) for split, chosen in splits.items()}

    def _rows(self, pairs: list[tuple[int, int]]) -> Iterator[dict[str, str]]:
        for a, b in pairs:
            yield {"prompt": f"{a:02d}+{b:02d}=", "completion": f"{a + b:03d}", "answer": f"{a + b:03d}"}


@dataclass(frozen=True)
class SumDigits(Sums):
    """The same sums without answers, `07+35=`, each with the tens digit of its answer as the class."""

    def _rows(self, pairs: list[tuple[int, int]]) -> Iterator[dict[str, str]]:
        for a, b in pairs:
            yield {"text": f"{a:02d}+{b:02d}=", "label": str((a + b) // 10 % 10)}


@dataclass(frozen=True)
class MaskedModel:
    """A bidirectional model with a mask token (EuroBERT: a Llama whose attention looks both ways), after LLaDA.

    Trained on the answers of `data` for `steps` optimiser steps, or not at all.
    """

    tokenizer: str
    shape: Shape
    seed: int
    data: str = "sums"
    steps: int = 0
    batch: int = 128
    learning_rate: float = 3e-3

    @property
    def needs(self) -> tuple[str, ...]:
        return (self.tokenizer, self.data) if self.steps else (self.tokenizer,)

    def ingredients(self) -> dict[str, Any]:
        return {**asdict(self), "torch": torch_release()}

    def make(self, folder: Path, built: dict[str, Path], progress: Progress, name: str) -> dict[str, Any]:
        import torch
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(built[self.tokenizer])
        tokenizer.add_special_tokens({"mask_token": MASK})
        with torch.random.fork_rng(devices=[]):  # whoever asks for a model keeps their random state
            torch.manual_seed(self.seed)
            model = masked_model(self.shape, tokenizer)
        figures: dict[str, Any] = {"parameters": model.num_parameters()}
        if self.steps:
            figures |= self._trained(model, tokenizer, built[self.data], progress, name)
        with no_bars():
            model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return figures

    def _trained(self, model: Any, tokenizer: Any, data: Path, progress: Progress, name: str) -> dict[str, Any]:
        import torch

        from kdlm.sandbox.pretraining import descend, one_thread, rate

        ids, given = encoded(tokenizer, data / "train.jsonl")
        optimizer = torch.optim.AdamW(model.parameters(), lr=self.learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, self.steps))
        generator = torch.Generator().manual_seed(self.seed)

        def loss() -> Any:
            return bound(model, ids[torch.randint(len(ids), (self.batch,), generator=generator)], given, generator)

        with one_thread():
            descend(model, loss, optimizer, schedule, self.steps, progress, name)
            with torch.no_grad():
                held_out = bound(model, *encoded(tokenizer, data / "eval.jsonl"), generator).item()
        return {"held_out_bound": round(held_out, 4)}


def masked_model(shape: Shape, tokenizer: Any) -> Any:
    """Return a model of a shape with fresh weights, for a tokenizer that has a mask token."""
    from transformers import EuroBertConfig, EuroBertForMaskedLM

    return EuroBertForMaskedLM(
        EuroBertConfig(
            vocab_size=len(tokenizer),
            hidden_size=shape.width,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            intermediate_size=shape.feed_forward,
            max_position_embeddings=1024,
            rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            mask_token_id=tokenizer.mask_token_id,
            dtype="float32",
        )
    )


def encoded(tokenizer: Any, path: Path) -> tuple[Any, int]:
    """Return the rows of a file as tokens `[rows, length]`, each ended by `<eos>`, and how many of them are prompt."""
    import torch

    rows = list(read_jsonl(path))
    prompts, answers = ([tokenizer(row[key])["input_ids"] for row in rows] for key in ("prompt", "completion"))
    whole = [[*prompt, *answer, tokenizer.eos_token_id] for prompt, answer in zip(prompts, answers, strict=True)]
    return torch.tensor(whole), len(prompts[0])


def bound(model: Any, ids: Any, given: int, generator: Any) -> Any:
    """Return the mean over answers of the bound on their negative log-likelihood, in nats a token.

    Of an answer's tokens k are hidden, k uniform from 1 to all of them, and each counts with their number over k.
    """
    import torch

    length = ids.shape[1] - given
    hidden = torch.randint(1, length + 1, (len(ids), 1), generator=generator)
    places = torch.rand(len(ids), length, generator=generator).argsort(-1).argsort(-1) < hidden
    answers = ids[:, given:]
    read = torch.cat([ids[:, :given], answers.masked_fill(places, model.config.mask_token_id)], 1)
    logits = model(input_ids=read).logits[:, given:]
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), answers.flatten(), reduction="none")
    return (losses.view(len(ids), length) * places / hidden).sum(-1).mean()


BYTES, TINY = "code-tokenizer-bytes", "code-tokenizer-tiny"
SHAPE, SMALL = (
    Shape(width=96, layers=2, heads=4, feed_forward=256),
    Shape(width=48, layers=1, heads=2, feed_forward=96),
)
ENCODER, SMALL_ENCODER = (
    Shape(width=96, layers=4, heads=4, feed_forward=256),
    Shape(width=48, layers=2, heads=4, feed_forward=96),
)
ENTRIES = (
    ("sums", "sums of two numbers below 100, all of one width", "9000 + 1000 rows", 1, Sums(held_out=10, seed=0)),
    ("sums-tens", "the same sums, their tens digit as a class", "9000 + 1000 rows", 1, SumDigits(held_out=10, seed=0)),
    ("masked-teacher", "fills in sums", "0.25 M parameters", 75, MaskedModel(BYTES, SHAPE, seed=0, steps=800)),
    ("masked-student", "a smaller one, not trained", "0.04 M parameters", 1, MaskedModel(BYTES, SMALL, seed=1)),
    (
        "masked-tiny",
        "one that begins to; also for tests",
        "0.04 M parameters",
        5,
        MaskedModel(BYTES, SMALL, seed=0, steps=300),
    ),
    ("code-encoder", "an encoder of code, not trained", "0.49 M parameters", 1, MaskedModel(TINY, ENCODER, seed=0)),
    ("code-encoder-small", "a smaller one", "0.07 M parameters", 1, MaskedModel(TINY, SMALL_ENCODER, seed=1)),
)
"""Name, what, size, seconds and spec of what the catalogue has of this file."""
