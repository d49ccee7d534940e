"""PartReader: a language model that reads one rank's part of every sequence, as sequence parallelism has it train."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor
from torch.nn.functional import pad

from kdlm.models.inside import Ask, Inside
from kdlm.models.prediction import LanguageModel, Predictor, plain
from kdlm.signal import IGNORE_INDEX, Dense, Hidden, Rows

ULYSSES = ("sdpa", "flash_attention_2", "flash_attention_3")
"""Attention that DeepSpeed lets ranks share: `eager` wants a mask."""
BY_LENGTH = ("dynamic", "longrope")
"""Rotary embeddings that depend on how long a sequence is, which a rank with a part of it does not see."""


@dataclass(frozen=True)
class Part:
    """Which of several equally long parts of each sequence a rank has.

    Attributes:
        number: counted from 0, in the order of the text.
        of: how many there are.
    """

    number: int
    of: int

    def span(self, length: int) -> tuple[int, int]:
        """Return where the part begins and how long it is: the last ones may reach beyond sequences of this length."""
        size = -(-length // self.of)
        return self.number * size, size

    def cut(self, x: Shaped[Tensor, "batch length"]) -> Shaped[Tensor, "batch part"]:
        """Return the part of what is given per token, filled up with zeros where it reaches beyond the end."""
        begin, size = self.span(x.shape[1])
        own = x[:, begin : begin + size]
        return pad(own, (0, size - own.shape[1]))

    def rows(self, rows: Rows, length: int) -> Rows:
        """Return rows of whole sequences as rows of the part. Raises where one is not in it."""
        begin, size = self.span(length)
        sequence, position = rows.index // length, rows.index % length - begin
        torch._assert_async(((position >= 0) & (position < size)).all(), "a row of another rank's part")
        return replace(rows, index=sequence * size + position)

    def labels(self, labels: Shaped[Tensor, "batch length"]) -> Shaped[Tensor, "batch length"]:
        """Return unshifted labels of whole sequences in which only the part's rows are trained on.

        A row is at the token before its label: the label of a part's last row lies in the next part.
        """
        begin, size = self.span(labels.shape[1])
        own = torch.full_like(labels, IGNORE_INDEX)
        own[:, begin + 1 : begin + size + 1] = labels[:, begin + 1 : begin + size + 1]
        return own


class PartReader(Predictor):
    """Has a causal model read its rank's part of every sequence while it trains, and whole sequences otherwise.

    What is handed in and asked for is said of whole sequences, padded on the right. Tokens have the positions that they
    have there. Who exchanges what attention needs of other parts is not seen here, and does so under the same
    condition: that the model is in training mode (DeepSpeed's Ulysses, arXiv 2309.14509). Padding is not masked: it
    comes after all that could see it.

    Args:
        whole: the reader of the model.
        part: this rank's.
    """

    def __init__(self, whole: Predictor, part: Part):
        super().__init__(whole.module, whole.reads_hidden)
        self.part = part

    def inside(
        self, batch: dict[str, Tensor], rows: Rows, ask: Ask, predicted: Rows | None = None
    ) -> tuple[Hidden | Dense | None, Inside]:
        if not self.module.training:
            return super().inside(batch, rows, ask, predicted)
        ids = batch["input_ids"]
        begin, size = self.part.span(length := ids.shape[1])
        positions = torch.arange(begin, begin + size, device=ids.device).repeat(len(ids), 1)
        ours = None if predicted is None else self.part.rows(predicted, length)
        own = {"input_ids": self.part.cut(ids), "position_ids": positions}
        return super().inside(own, self.part.rows(rows, length), ask, ours)


def refuse_parts(model: LanguageModel, size: int) -> None:
    """Raise ValueError for a model whose layers would not be those of whole sequences on so many ranks."""
    model = plain(model)
    config = model.config.get_text_config()
    heads, shared = config.num_attention_heads, getattr(config, "num_key_value_heads", None)
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    cannot = {
        f"its attention is {config._attn_implementation}: load it with one of {', '.join(ULYSSES)}": (
            config._attn_implementation not in ULYSSES
        ),
        "its attention is of its own, and nobody could exchange what it needs": not getattr(
            model, "_supports_attention_backend", False
        ),
        f"its {heads} heads cannot be dealt out": heads % size > 0,
        f"its {shared} key-value heads cannot be dealt out": not shared or (shared % size > 0 and size % shared > 0),
        f"it has layers that see other than all tokens before ({', '.join(sorted(kinds))})": (
            kinds != {"full_attention"} or _slides(config)
        ),
        "its rotary embeddings depend on how long a sequence is": rope.get("rope_type") in BY_LENGTH,
    }
    for why, wrong in cannot.items():
        if wrong:
            raise ValueError(f"sequence parallelism (sp_size: {size}): the student, {type(model).__name__}: {why}")


def _slides(config: Any) -> bool:
    return getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True)
