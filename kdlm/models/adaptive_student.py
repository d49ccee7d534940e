"""A student whose feed-forward layers compute as much as a token needs: how it is made, written and opened again."""

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from kdlm.models.adaptive import AdaptiveMLP, adaptive_layers
from kdlm.models.loading import AnySource, StudentOptions

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

KINDS = ("llama", "mistral", "qwen2", "qwen3")


class Adaptive(StudentOptions):
    """A model whose feed-forward layers are learners and a gate that says how many of them a token uses, for `acm`.

    It begins as the source: its learners are groups of the source's neurons, the strongest first, and every token uses
    all. The folder that it leaves has its own entry in config.json (`adaptive`), by which kdlm opens it (`pretrained`);
    transformers alone opens it as a model in which every token uses all learners, and leaves the gates out.
    """

    name: Literal["adaptive"] = "adaptive"
    source: AnySource
    """The model whose layers become adaptive, usually the teacher. Give it `dtype: float32` where stored in less."""
    layers: list[int] | None = None
    """Layers, counted from 0, whose feed-forward part is replaced; by default all."""
    learners: int = Field(4, ge=2)
    """Groups of neurons of equal size; the number of neurons is a multiple of it."""

    def config(self) -> Any:
        return described(self.source.config(), self.layers, self.learners)

    def load(self) -> "PreTrainedModel":
        """Open the source and divide its layers. Raises ValueError for a model that this cannot be done with."""
        if self.source.quantization != "none":
            raise ValueError("student.source.quantization: learners are parts of whole weights; set none")
        model: Any = self.source.load()
        described(model.config, self.layers, self.learners)
        for layer in adaptive_layers(make_adaptive(model)).values():
            layer.order()
        return model

    def tokenizer(self) -> "PreTrainedTokenizerBase":
        return self.source.tokenizer()

    def describe(self) -> str:
        return f"{self.source.describe()} with {self.learners} learners a layer"


def described(config: Any, layers: Sequence[int] | None, learners: int) -> Any:
    """Write into a configuration which layers are adaptive. Raises ValueError where they cannot be."""
    total = config.num_hidden_layers
    if config.model_type not in KINDS:
        raise ValueError(f"student: layers of {', '.join(KINDS)} can be adaptive, not of {config.model_type}")
    if getattr(config, "adaptive", None):
        raise ValueError("student.source: its layers are adaptive already: open it by name: pretrained")
    layers = list(range(total)) if layers is None else list(layers)
    if not layers or len(set(layers)) < len(layers) or not all(0 <= layer < total for layer in layers):
        raise ValueError(f"student.layers: {layers} must be distinct indices from 0 to {total - 1}")
    if config.intermediate_size % learners:
        raise ValueError(f"student.learners: {config.intermediate_size} neurons are not divided by {learners}")
    config.adaptive = {"layers": layers, "learners": learners}
    return config


def gate_width(neurons: int) -> int:
    """Return the hidden units of a gate that costs about 1 % of its layer (one map in against three), at least 8."""
    return max(8, 3 * neurons // 100)


def make_adaptive(model: Any) -> Any:
    """Put adaptive layers into a model, in place, as its configuration describes them, and return it."""
    for layer in model.config.adaptive["layers"]:
        block = model.model.layers[layer]
        width = gate_width(model.config.intermediate_size)
        block.mlp = AdaptiveMLP(block.mlp, model.config.adaptive["learners"], width)
    if not hasattr(type(model), "is_adaptive"):
        model.__class__ = adaptive_class(type(model))
    return model


@cache
def adaptive_class(base: type) -> Any:
    """Return the model class of adaptive layers, which `from_pretrained` fills; it has the name of the plain one."""

    def init(self: Any, config: Any, *args: Any, **options: Any) -> None:
        base.__init__(self, config, *args, **options)
        make_adaptive(self)

    return type(base.__name__, (base,), {"__init__": init, "__module__": base.__module__, "is_adaptive": True})
