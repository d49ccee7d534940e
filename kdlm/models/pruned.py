"""A student cut from a larger model, in depth and width."""

import os
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from kdlm.models.loading import AnySource, StudentOptions
from kdlm.section import Section

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Width(Section):
    """Sizes of a width-pruned student; what is left out keeps the source's size."""

    hidden_size: int | None = Field(None, ge=1)
    """Width of the residual stream."""
    intermediate_size: int | None = Field(None, ge=1)
    """Neurons of each feed-forward layer; of each expert in Mixtral, OLMoE and Phi-MoE."""
    moe_intermediate_size: int | None = Field(None, ge=1)
    """Neurons of each expert in Qwen3-MoE, where `intermediate_size` is that of its dense layers."""
    num_attention_heads: int | None = Field(None, ge=1)
    """Query heads; must be a multiple of the key-value heads."""
    num_key_value_heads: int | None = Field(None, ge=1)
    """Key-value heads."""


class Block(Section):
    """Consecutive layers to leave out: those that turn the residual stream least (arXiv 2403.17887)."""

    drop: int = Field(ge=0)
    """How many."""
    tokens: Literal["last", "all"] = "last"
    """Where that is measured: at the last token of each sequence, as in the paper, or at all of them. Of answers that
    end with a token that nothing follows, take all."""


class Pruned(StudentOptions):
    """A student cut from a larger model: some of its layers, and the strongest channels, neurons and heads of each.

    Of a mixture of experts all experts and the router stay, and each expert is cut to the same size (SlimMoE)."""

    name: Literal["pruned"] = "pruned"
    source: AnySource
    """The model to cut from, usually the teacher."""
    layers: int | list[int] | Block | None = None
    """Layers to keep: a number (spread evenly, first and last kept) or their indices; or `{drop: n}`: all but the n
    consecutive ones that change least; by default all."""
    width: Width = Field(default_factory=Width)  # pyright: ignore[reportArgumentType]
    """Sizes to cut to. Neurons of experts go by |gradient x activation|, everything else by its weights."""
    rows: int = Field(16, ge=1)
    """First rows of the training data that are read to find the block of layers to drop, or the neurons of experts."""

    def config(self) -> Any:
        from kdlm.models.pruning import pruned_config

        config, layers = self.source.config(), self.layers
        if isinstance(layers, Block):  # which ones go is measured later; as many as these
            layers = list(range(self._left(config)))
        return pruned_config(config, layers, self.width)[0]

    def load(self) -> "PreTrainedModel":
        """Cut the source by its weights alone. Raises ValueError where a block of layers is to be found."""
        from kdlm.models.pruning import prune

        if isinstance(self.layers, Block):
            raise ValueError("student.layers: the block to drop is measured on rows: load_from(rows, seed)")
        return prune(self.source.load(), self.layers, self.width)

    def load_from(self, rows: Any, seed: int) -> "PreTrainedModel":
        """Cut the source by its weights and by what is measured on the first rows; say on rank 0 which layers go."""
        from kdlm.models import calibration
        from kdlm.models.pruning import expert_size, kept_layers, prune, pruned_config, without_block

        model, layers, scores = self.source.load(), self.layers, {}
        if isinstance(layers, Block):
            self._left(model.config)
            distances = calibration.angular_distances(model, layers.drop, self._read(rows), layers.tokens)
            if int(os.environ.get("RANK", "0")) == 0:
                print(f"student: {_said(distances, layers.drop)}")
            layers = without_block(distances, layers.drop)
        smaller = pruned_config(model.config, layers, self.width)[0]
        if calibration.expert_layers(model) and expert_size(smaller) < expert_size(model.config):
            scores = calibration.neuron_importance(model, self._read(rows))
        return prune(model, kept_layers(layers, model.config.num_hidden_layers), self.width, scores)

    def _read(self, rows: Any) -> Any:
        from kdlm.models.calibration import batches

        return batches(rows, self.rows)

    def _left(self, config: Any) -> int:
        """Return how many layers a block leaves. Raises ValueError where it leaves none."""
        drop, total = getattr(self.layers, "drop", 0), config.num_hidden_layers
        if drop >= total:
            raise ValueError(f"student.layers.drop: {drop} is not below the source's {total} layers")
        return total - drop

    def tokenizer(self) -> "PreTrainedTokenizerBase":
        return self.source.tokenizer()

    def describe(self) -> str:
        return f"pruned from {self.source.describe()}"


def _said(distances: Any, drop: int) -> str:
    """Return which layers go, and how far they and the block that turns most turn the residual stream."""
    if not drop:
        return "no layer left out"
    first, most = int(distances.argmin()), int(distances.argmax())
    return (
        f"layers {first} to {first + drop - 1} of {len(distances) + drop - 1} left out, counted from 0: angular "
        f"distance {distances[first]:.4f}, where the {drop} from layer {most} on have {distances[most]:.4f}"
    )
