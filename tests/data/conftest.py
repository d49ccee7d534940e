"""Tokenizers made here, and writers of small data sets."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from chat_templates import CHATML, FORGETFUL, MARKED
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from kdlm.data import Data, DataSection, load_data

CORPUS = [
    "the quick brown fox jumps over the lazy dog and says hello to the whole world",
    "def step(self, batch):\n    return self.losses(batch)\n",
    "what is two and three? the answer is five. what is seven minus four? the answer is three.",
]


def make_tokenizer(size: int = 400, template: str | None = CHATML, corpus: list[str] = CORPUS) -> Any:
    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(corpus, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture
def new_tokenizer() -> Callable[..., Any]:
    """`new_tokenizer(size=400, template=CHATML, corpus=CORPUS)` trains a small byte-level BPE tokenizer."""
    return make_tokenizer


@pytest.fixture
def tokenizer() -> Any:
    return make_tokenizer()


@pytest.fixture(params=[CHATML, MARKED], ids=["prefixes", "generation markers"])
def chat_tokenizer(request: pytest.FixtureRequest) -> Any:
    """A tokenizer with a ChatML template, once without generation markers and once with them."""
    return make_tokenizer(template=request.param)


@pytest.fixture
def forgetful_tokenizer() -> Any:
    """A tokenizer whose template takes the reasoning out of all turns but the last."""
    return make_tokenizer(template=FORGETFUL)


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[..., str]:
    """`jsonl(rows, name="rows.jsonl")` writes rows and returns the path."""

    def write(rows: list[Any], name: str = "rows.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return write


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., Data]:
    """`load(paths, tokenizer, **section)` loads with a cache of this test; a path may be a Source's dict."""

    def loaded(paths: Any, tokenizer: Any, *, seed: int = 0, **section: Any) -> Data:
        many = paths if isinstance(paths, list) else [paths]
        sources = [path if isinstance(path, dict) else {"path": path} for path in many]
        settings = {"cache": str(tmp_path / "cache"), "train": sources, **section}
        return load_data(DataSection.model_validate(settings), tokenizer, seed=seed)

    return loaded


@pytest.fixture
def trained_text(tokenizer: Any) -> Callable[[dict[str, Any]], str]:
    """Decode the tokens of a row that are trained on."""
    return lambda row: tokenizer.decode([int(token) for token in row["labels"] if token != -100])
