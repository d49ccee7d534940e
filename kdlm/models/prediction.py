"""Predictor: reads a language model, causal, masked or with images, as signals on the kept rows of a batch."""

import inspect
import logging
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor
from torch.func import functional_call

from kdlm.models.frozen_copies import whole
from kdlm.models.inside import Ask, Inside, attends_backwards, recording, shortened, stack_of
from kdlm.models.modes import evaluating
from kdlm.signal import Dense, Head, Hidden, Rows

logger = logging.getLogger(__name__)

LanguageModel = Any
"""A transformers causal language model, or a PEFT model around one: neither has a type that says what both can do."""

MODEL_INPUTS = frozenset({"input_ids", "attention_mask", "position_ids", "pixel_values", "token_type_ids"})
"""What any model may be given; a model's own forward may name more (`image_grid_thw`, `pixel_attention_mask` ...)."""


class TextReader:
    """What a reader of any model of texts says of its shape."""

    module: Any

    @property
    def causal(self) -> bool:
        """Whether a token sees only what is before it."""
        return attends_backwards(backbone(self.module))

    @property
    def hidden_size(self) -> int:
        return self.module.config.get_text_config().hidden_size

    @property
    def num_layers(self) -> int:
        return self.module.config.get_text_config().num_hidden_layers


class Predictor(TextReader):
    """Asks a language model for its last hidden states at the kept rows, and hands them out with the model's head.

    The head is not run here: the losses project chunk by chunk, so that `[rows, vocab]` never exists. Models whose
    logits are not `Head.logits(hidden)` (an adapter on the head, prompt-learning PEFT, an unknown transform) are read
    through their own forward instead and give `Dense` signals; which one is found out by comparing both once.

    Args:
        reads_hidden: whether logits are `Head.logits(hidden)`, where it is known already.
    """

    tells_classes = False
    """It predicts tokens."""

    def __init__(self, model: LanguageModel, reads_hidden: bool | None = None):
        self.module = model
        self.inputs = inputs_of(model)
        self.reads_hidden = _head_explains_logits(model) if reads_hidden is None else reads_hidden
        if not self.reads_hidden:
            logger.warning("%s: logits are not head(hidden); falling back to whole logits", type(model).__name__)

    def __call__(self, batch: dict[str, Tensor], rows: Rows) -> Hidden | Dense:
        """Return the model's signal at `rows`, in the graph of the model's parameters."""
        return self.with_layers(batch, rows, ())[0]

    def with_layers(
        self, batch: dict[str, Tensor], rows: Rows, layers: Sequence[int]
    ) -> tuple[Hidden | Dense, list[Float[Tensor, "rows hidden"]]]:
        """Return the signal and, at the same rows, the outputs of decoder layers `layers` (0 is the first layer)."""
        signal, inside = self.inside(batch, rows, Ask(layers=layers), rows)
        assert signal is not None
        return signal, inside.hidden

    def inside(
        self, batch: dict[str, Tensor], rows: Rows, ask: Ask, predicted: Rows | None = None
    ) -> tuple[Hidden | Dense | None, Inside]:
        """Return the signal at the rows `predicted`, and what is asked of the model's inside at `rows`.

        Without `predicted` there is no signal, and the layers above the highest one that is asked are not run.
        """
        body, inputs = backbone(self.module), {key: batch[key] for key in batch if key in self.inputs}
        signal: Hidden | Dense | None = None
        cut = shortened(body, ask.depth) if predicted is None else nullcontext()
        with recording(body, ask) as recorded, cut:
            if self.reads_hidden or predicted is None:
                last = body(**inputs, use_cache=False).last_hidden_state
                signal = None if predicted is None else Hidden(predicted.select(last), head(self.module))
            else:
                signal = Dense(predicted.select(self.module(**inputs, use_cache=False).logits))
        return signal, recorded.at(rows)

    def embed(self, ids: Int[Tensor, "rows"]) -> Float[Tensor, "rows width"]:
        """Return what the model reads for these tokens: its input embeddings, in the graph of its parameters."""
        layer = plain(self.module).get_input_embeddings()
        if isinstance(layer.weight, DTensor):  # in shards, and nothing that runs gathers it
            return functional_call(layer, {"weight": whole(layer.weight)}, (ids,))
        return layer(ids)

    @property
    def mask_id(self) -> int | None:
        """The token that stands for a hidden one, see `mask_id_of`."""
        return mask_id_of(self.module)


def plain(model: LanguageModel) -> LanguageModel:
    """Return the transformers model below a PEFT wrapper (adapters on its linear layers stay in force)."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def is_text_classifier(model: Any) -> bool:
    """Whether a network is one of transformers' `...ForSequenceClassification`."""
    return type(plain(model)).__name__.endswith("ForSequenceClassification")


def mask_id_of(model: Any) -> int | None:
    """Return the token by which a masked language model knows what is hidden: the `mask_token_id` of its configuration.

    None of any other network: a causal model's configuration has none, and a classifier of texts fills nothing in.
    """
    if is_text_classifier(model):
        return None
    return getattr(getattr(plain(model), "config", None), "mask_token_id", None)


def backbone(model: LanguageModel) -> Any:
    """Return the part of a causal LM that gives hidden states: `model.model`, `model.transformer` ..."""
    return plain(model).base_model


def decoder_layers(model: LanguageModel) -> nn.ModuleList:
    """Return the decoder layers of a causal LM. Raises ValueError when the model keeps them under an unknown name."""
    owner, name = stack_of(backbone(model))
    return getattr(owner, name)


def layer_paths(model: LanguageModel) -> list[str]:
    """Return the dotted paths of a causal LM's decoder layers."""
    found = {id(layer): index for index, layer in enumerate(decoder_layers(model))}
    named = {found[id(module)]: path for path, module in model.named_modules() if id(module) in found}
    return [named[index] for index in range(len(found))]


def inputs_of(model: LanguageModel) -> frozenset[str]:
    """Return the entries of a batch that the model takes: what its forward names, but for the labels."""
    forwards = (plain(model).forward, backbone(model).forward)
    named = {name for forward in forwards for name in inspect.signature(forward).parameters}
    return (MODEL_INPUTS | named) - {"labels"}


def head(model: LanguageModel) -> Head:
    """Return the output projection of a causal LM as a `Head` that shares its parameters."""
    layer = plain(model).get_output_embeddings()
    if hasattr(layer, "modules_to_save"):  # PEFT trains a copy of the head
        layer = layer.original_module if layer.disable_adapters else layer.modules_to_save[layer.active_adapter]
    config = plain(model).config.get_text_config()
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    softcap = getattr(config, "final_logit_softcapping", None)
    return Head(layer.weight, getattr(layer, "bias", None), scale, softcap, _group_of(model, layer.weight))


def _group_of(model: LanguageModel, weight: Tensor) -> ProcessGroup | None:
    """Return the ranks over which transformers' tensor parallelism has sliced a head by token ids; None of a whole one.

    FSDP2's slices look alike, and belong to ranks with other rows.
    """
    if not tensor_parallel(model) or not isinstance(weight, DTensor) or not weight.placements[0].is_shard(0):
        return None
    return weight.device_mesh.get_group()


def tensor_parallel(model: Any) -> int:
    """Return over how many ranks transformers has sliced a model's layers as it was loaded; 0 of any other network."""
    size = getattr(plain(model), "tp_size", None) or 1
    return size if size > 1 else 0


def _head_explains_logits(model: LanguageModel) -> bool:
    """Compare the model's own logits with `head(hidden)` on a few tokens."""
    if getattr(model, "active_peft_config", None) is not None and model.active_peft_config.is_prompt_learning:
        return False
    layer = plain(model).get_output_embeddings()
    if layer is None or hasattr(layer, "base_layer"):  # an adapter sits on the head: its weight is not the whole map
        return False
    ids = torch.arange(1, 9, device=next(model.parameters()).device)[None]
    with evaluating(model), torch.no_grad():
        own = model(input_ids=ids, use_cache=False).logits
        last = backbone(model)(input_ids=ids, use_cache=False).last_hidden_state
        if last.shape[-1] != layer.weight.shape[-1]:  # a transform before the head changes the width (ELECTRA)
            return False
        ours = head(model).logits(last)
    if own.shape != ours.shape:
        return False
    scale = own.float().abs().max().clamp(min=1e-6)
    return bool((own.float() - ours.float()).abs().max() <= 2e-2 * scale)
