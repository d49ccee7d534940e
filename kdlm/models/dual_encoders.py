"""DualEncoder: reads the embeddings of images and texts; where one comes from, and one cut from a larger one."""

import copy
import math
import re
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import normalize

from kdlm.models.configured import Configured
from kdlm.section import Section

LARGEST_SCALE = 100.0  # of CLIP's own training


def is_dual_encoder(module: Any) -> bool:
    """Whether a network embeds images and texts in one space, as CLIP does."""
    return all(hasattr(module, name) for name in ("get_image_features", "get_text_features", "logit_scale"))


class DualEncoder:
    """Asks a model for the embeddings of images and texts.

    Args:
        module: CLIP, SigLIP or their kin of transformers.
    """

    provides = frozenset({"teacher.embeddings"})

    def __init__(self, module: Any):
        self.module = module

    @property
    def scale(self) -> Tensor:
        """What the model has learned to multiply products of embeddings by, 100 at most."""
        return self.module.logit_scale.clamp(max=math.log(LARGEST_SCALE)).exp()

    def images(self, pixels: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch embedding"]:
        """Return the embeddings of images, of length 1, in the graph of the parameters."""
        return normalize(self.module.get_image_features(pixel_values=pixels).pooler_output, dim=-1)

    def texts(
        self, ids: Int[Tensor, "batch length"], mask: Int[Tensor, "batch length"] | None = None
    ) -> Float[Tensor, "batch embedding"]:
        """Return the embeddings of texts, of length 1, in the graph of the parameters."""
        return normalize(self.module.get_text_features(input_ids=ids, attention_mask=mask).pooler_output, dim=-1)


class DualEncoderSource(Configured):
    """A model that embeds images and texts in one space (CLIP)."""

    kind: ClassVar = "CLIPModel"
    sandbox: ClassVar = ("digits-clip",)

    name: Literal["dual_encoder"] = "dual_encoder"


class DualEncoderStudent(DualEncoderSource):
    """A dual encoder to train."""


class Tower(Section):
    """Sizes of one tower of an inherited student; what is left out keeps the source's size."""

    layers: int | None = Field(None, ge=1)
    """Layers to keep: every k-th, counted from the front."""
    width: int | None = Field(None, ge=1)
    """Channels to keep, the first; with them the first heads: a multiple of the source's width of a head."""
    neurons: int | None = Field(None, ge=1)
    """Neurons of each feed-forward layer to keep, the first."""


class InheritedStudent(Section):
    """A dual encoder cut from a larger one by hand: every k-th layer, the first channels and heads (TinyCLIP)."""

    name: Literal["inherited"] = "inherited"
    of: DualEncoderSource
    """The model to cut from, usually the teacher."""
    vision: Tower = Field(default_factory=Tower)  # pyright: ignore[reportArgumentType]
    """Sizes of the images' tower."""
    text: Tower = Field(default_factory=Tower)  # pyright: ignore[reportArgumentType]
    """Sizes of the texts' tower."""
    embedding: int | None = Field(None, ge=1)
    """Width of the embeddings to keep, the first."""

    def load(self) -> Any:
        """Return the cut model. Raises ValueError where a size cannot be had."""
        return inherit(self.of.load(), self.vision, self.text, self.embedding)

    def describe(self) -> str:
        """Return the name a reader knows this model by."""
        return f"inherited from {self.of.describe()}"


def inherit(model: Any, vision: Tower, text: Tower, embedding: int | None = None) -> nn.Module:
    """Return a smaller model whose every weight is a slice of `model`'s, which is left as it is.

    Heads lie one behind the other in a projection, so the first heads are its first rows, as the first channels are of
    all else: each weight is the corner of the source's that starts at 0. Raises ValueError for a size that is larger
    than the source's or does not make whole heads.
    """
    config = copy.deepcopy(model.config)
    kept = {}
    for name, sizes in (("vision", vision), ("text", text)):
        kept[name] = _cut(getattr(config, f"{name}_config"), sizes, f"student.{name}")
    if embedding is not None:
        _not_above(embedding, config.projection_dim, "student.embedding")
        config.projection_dim = config.vision_config.projection_dim = config.text_config.projection_dim = embedding
    student = type(model)(config).to(model.dtype)
    source = model.state_dict()
    with torch.no_grad():
        for name, weight in student.state_dict().items():
            weight.copy_(source[_source_name(name, kept)][tuple(slice(size) for size in weight.shape)])
    return student


def _cut(config: Any, sizes: Tower, key: str) -> list[int]:
    """Set the sizes of a tower's configuration; return the source's layers that it keeps."""
    layers, width = config.num_hidden_layers, config.hidden_size
    if sizes.neurons is not None:
        config.intermediate_size = _not_above(sizes.neurons, config.intermediate_size, f"{key}.neurons")
    if sizes.width is not None:
        head = width // config.num_attention_heads
        config.hidden_size = _not_above(sizes.width, width, f"{key}.width")
        if sizes.width % head:
            raise ValueError(f"{key}.width: {sizes.width} is not a multiple of {head}, the width of a head")
        config.num_attention_heads = sizes.width // head
    if sizes.layers is not None:
        config.num_hidden_layers = _not_above(sizes.layers, layers, f"{key}.layers")
    return [i * layers // config.num_hidden_layers for i in range(config.num_hidden_layers)]


def _not_above(size: int, whole: int, key: str) -> int:
    if size > whole:
        raise ValueError(f"{key}: {size} is larger than the source's {whole}")
    return size


def _source_name(name: str, kept: dict[str, list[int]]) -> str:
    """Return the name that a weight of the student has in the source."""
    layers = kept["vision" if name.startswith("vision") else "text"]
    return re.sub(r"\.layers\.(\d+)\.", lambda match: f".layers.{layers[int(match[1])]}.", name)
