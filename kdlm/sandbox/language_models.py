"""The causal language models: their shapes, how they are initialised, trained and written."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from kdlm.sandbox.progress import Progress


@dataclass(frozen=True)
class Shape:
    """A Qwen3 architecture: attention with query and key norms, SwiGLU, RoPE; embeddings tied to the head."""

    width: int
    layers: int
    heads: int
    feed_forward: int

    def config(self, vocab_size: int, eos: int, pad: int, positions: int) -> Any:
        from transformers import Qwen3Config

        return Qwen3Config(
            vocab_size=vocab_size,
            hidden_size=self.width,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads,
            head_dim=self.width // self.heads,
            intermediate_size=self.feed_forward,
            max_position_embeddings=positions,
            rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=eos,
            pad_token_id=pad,
            dtype="float32",
        )


@dataclass(frozen=True)
class Training:
    """How a sandbox model is trained.

    Attributes:
        file: the jsonl file of the model's dataset, without its suffix.
        steps: optimiser steps.
        batch: windows a step.
        window: tokens a window; a window may run over the border of two documents, which `<eos>` marks.
        learning_rate: at its peak, after the warm-up.
    """

    file: str
    steps: int
    batch: int
    window: int
    learning_rate: float


@dataclass(frozen=True)
class LanguageModel:
    """A causal model on a sandbox tokenizer: trained on a file of `data`, or fresh when `training` is None.

    `positions` is the length that its config allows; the rotary embedding has no weights of it.
    """

    tokenizer: str
    shape: Shape
    seed: int
    data: str = "code"
    training: Training | None = None
    positions: int = 1024

    @property
    def needs(self) -> tuple[str, ...]:
        return (self.tokenizer, self.data) if self.training else (self.tokenizer,)

    def ingredients(self) -> dict[str, Any]:
        spec = asdict(self)
        if self.positions == 1024:  # folders from before there was a choice keep their digest
            del spec["positions"]
        return {**spec, "torch": torch_release()}

    def make(self, folder: Path, built: dict[str, Path], progress: Progress, name: str) -> dict[str, Any]:
        import torch
        from transformers import AutoTokenizer, Qwen3ForCausalLM

        from kdlm.sandbox.pretraining import pretrain

        tokenizer = AutoTokenizer.from_pretrained(built[self.tokenizer])
        config = self.shape.config(len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id, self.positions)
        with torch.random.fork_rng(devices=[]):  # whoever asks for a model keeps their random state
            torch.manual_seed(self.seed)
            model = Qwen3ForCausalLM(config)
        figures: dict[str, Any] = {"parameters": model.num_parameters()}
        if self.training:
            figures |= pretrain(model, tokenizer, built[self.data], self.training, self.seed, progress, name)
        with no_bars():
            model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return figures


@dataclass(frozen=True)
class PaddedModel:
    """Another model with rows of noise added to its head, as hub models carry rows beyond their tokenizer's last id."""

    model: str
    rows: int
    seed: int

    @property
    def needs(self) -> tuple[str, ...]:
        return (self.model,)

    def ingredients(self) -> dict[str, Any]:
        return {**asdict(self), "torch": torch_release()}

    def make(self, folder: Path, built: dict[str, Path], progress: Progress, name: str) -> dict[str, Any]:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        with no_bars():
            model: Any = AutoModelForCausalLM.from_pretrained(built[self.model], dtype=torch.float32)
        real = model.config.vocab_size
        model.resize_token_embeddings(self.rows, mean_resizing=False)
        rows = model.get_output_embeddings().weight.data
        generator = torch.Generator().manual_seed(self.seed)
        rows[real:] = torch.randn(self.rows - real, rows.shape[1], generator=generator) * rows[:real].std()
        with no_bars():
            model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(built[self.model]).save_pretrained(folder)
        return {"parameters": model.num_parameters(), "tokens": real, "rows": self.rows}


@contextmanager
def no_bars() -> Iterator[None]:
    """Without the bars of transformers, which count to one file here and stand between the build's own lines."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def torch_release() -> str:
    """Another torch draws and sums differently; its patch releases do not."""
    return ".".join(version("torch").split(".")[:2])
