"""A student that is a model with another tokenizer: its body as it was, its embedding and head made anew."""

from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field
from torch import nn

from kdlm.models.loading import AnySource, StudentOptions, open_pretrained
from kdlm.models.token_rows import TokenRows, token_rows
from kdlm.sandbox import build, names
from kdlm.section_loader import suggestion

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ROPE = ("rope_parameters", "rope_theta")
"""What the configuration of a model has whose positions are rotations, of which there is no last one."""


class Retokenised(StudentOptions):
    """A student that is a model given another tokenizer: tokenizer transfer, with the model itself as the teacher."""

    name: Literal["retokenised"] = "retokenised"
    source: AnySource
    """The model, usually the teacher. Give it `dtype: float32` where its weights are stored in less."""
    tokenizer_from: str
    """The new tokenizer: hub id, local folder, or `sandbox:code-tokenizer-bytes`."""
    max_position_embeddings: int | None = Field(None, ge=1)
    """Tokens that the student may read at once, where not as many as the source: a text has about four times as many
    bytes as tokens. Of models with rotary positions only."""

    def config(self) -> Any:
        return self._described(self.source.config(), self.tokenizer())

    def load(self) -> "PreTrainedModel":
        """Open the source and give it the tokenizer. Raises ValueError for a model that this cannot be done with."""
        if self.source.quantization != "none":
            raise ValueError("student.source.quantization: the rows of a new tokenizer must be trained; set none")
        model, tokenizer = self.source.load(), self.tokenizer()
        self._described(model.config, tokenizer)
        rows: Any = model.get_input_embeddings().weight.shape[0]  # pyright: ignore[reportAttributeAccessIssue]
        return retokenise(model, token_rows(tokenizer, self.source.tokenizer(), rows), tokenizer)

    def tokenizer(self) -> "PreTrainedTokenizerBase":
        return open_tokenizer(self.tokenizer_from)

    def describe(self) -> str:
        return f"{self.source.describe()} read with {self.tokenizer_from}"

    def _described(self, config: Any, tokenizer: Any) -> Any:
        """Write into a configuration of the source what is the student's."""
        text = config.get_text_config()
        if self.max_position_embeddings is not None:
            if not any(getattr(text, name, None) for name in ROPE):
                raise ValueError(
                    f"student.max_position_embeddings: {self.source.describe()} has a table of positions, and no more "
                    "than its rows; leave it out"
                )
            text.max_position_embeddings = self.max_position_embeddings
        text.vocab_size = max(tokenizer.get_vocab().values()) + 1
        for role in ("bos", "eos", "pad"):
            setattr(text, f"{role}_token_id", getattr(tokenizer, f"{role}_token_id"))
        return config


@torch.no_grad()
def retokenise(model: Any, rows: TokenRows, tokenizer: "PreTrainedTokenizerBase") -> "PreTrainedModel":
    """Put new rows into a model's embedding and head, in place; where the two are one, they stay one.

    Raises ValueError where it has another table of the same tokens.
    """
    embedding = model.get_input_embeddings()
    if others := _other_tables(model, embedding):
        raise ValueError(
            f"student.source: {type(model).__name__} looks its tokens up in {others[0]} too: not supported"
        )
    head = model.get_output_embeddings()
    weight, bias = rows.of(head.weight), None if head.bias is None else rows.of(head.bias)
    inputs = rows.of(embedding.weight)
    model.resize_token_embeddings(len(inputs), mean_resizing=False)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    embedding.weight.copy_(inputs)
    if embedding.padding_idx is not None:  # a row that is not trained, now another one
        embedding.padding_idx = tokenizer.pad_token_id
    if head.weight is not embedding.weight:
        head.weight.copy_(weight)
    if bias is not None:
        head.bias.copy_(bias)
    model.generation_config = _generating(model.generation_config, rows, tokenizer)
    return model


def open_tokenizer(given: str) -> "PreTrainedTokenizerBase":
    """Open a tokenizer by hub id, folder, or name in the sandbox. Raises ValueError where there is none."""
    from transformers import AutoTokenizer

    if not given.startswith("sandbox:"):
        return open_pretrained(AutoTokenizer, given)
    name, known = given.removeprefix("sandbox:"), [one.name for one in names() if "tokenizer" in one.name]
    if name not in known:
        raise ValueError(
            f"student.tokenizer_from: the sandbox has no tokenizer {name!r}{suggestion(name, known) or '.'} "
            f"One of: {', '.join(known)}"
        )
    return open_pretrained(AutoTokenizer, str(build(name)))


def _other_tables(model: nn.Module, embedding: nn.Embedding) -> list[str]:
    tables = ((name, module) for name, module in model.named_modules() if isinstance(module, nn.Embedding))
    return [name for name, one in tables if one is not embedding and one.num_embeddings == embedding.num_embeddings]


def _generating(config: Any, rows: TokenRows, tokenizer: Any) -> Any:
    """Return how to generate, in new ids: text ends with the partners of what ended it, and the tokenizer's own end.

    Other settings that name tokens (suppressed or forced ones) are dropped: what they mean depends on the tokenizer.
    """
    ends = config.eos_token_id
    old = set() if ends is None else set(ends) if isinstance(ends, list) else {ends}
    new = {new for new, partner in rows.partners.items() if partner in old} | {tokenizer.eos_token_id} - {None}
    named = [
        key for key in config.to_dict() if key.endswith(("token_id", "words_ids", "suppress_tokens", "sequence_bias"))
    ]
    for key in named:
        setattr(config, key, None)
    config.bos_token_id, config.pad_token_id = tokenizer.bos_token_id, tokenizer.pad_token_id
    config.eos_token_id = min(new) if len(new) == 1 else sorted(new) or None
    return config
