"""A student that is a model some of whose attention layers are mixers of linear cost, which begin as that attention."""

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from kdlm.models.loading import AnySource, StudentOptions

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Replaced(StudentOptions):
    """A student whose attention is replaced in some layers: by Mamba-2 (Llama, Mistral, Qwen2), or by gated DeltaNet
    (Qwen3). What is left is a model of transformers' own (Bamba, Qwen3.5)."""

    name: Literal["replaced"] = "replaced"
    source: AnySource
    """The model whose layers are replaced, usually the teacher. Give it `dtype: float32` where it is stored in less."""
    layers: list[int] | None = None
    """Layers, counted from 0, whose attention is replaced; by default every `every`-th."""
    every: int = Field(4, ge=1)
    """Replace the last of every so many layers: 4 replaces a quarter of them, 1 all."""
    start: Literal["attention", "random"] = "attention"
    """What a mixer's projections begin as: those of the attention that it stands for, or as the architecture draws
    them."""
    trains: Literal["all", "mixers"] = "all"
    """Weights that are trained: all, or those of the new mixers alone, as in MaTVLM."""
    seed: int = 0
    """Seed of what is drawn."""

    def chosen(self, config: Any) -> list[int]:
        """Return the layers that are replaced. Raises ValueError for both ways to say it."""
        if self.layers is not None and "every" in self.model_fields_set:
            raise ValueError("student: give layers or every, not both")
        return list(range(self.every - 1, config.num_hidden_layers, self.every)) if self.layers is None else self.layers

    def config(self) -> Any:
        from kdlm.models.hybrids import hybrid_config

        config = self.source.config()
        return hybrid_config(config, self.chosen(config))

    def load(self) -> "PreTrainedModel":
        """Open the source and replace its layers. Raises ValueError for a model that this cannot be done with."""
        from kdlm.models.hybrids import hybrid, replaced_layers

        if self.source.quantization != "none":
            raise ValueError("student.source.quantization: the weights of new layers must be trained; set none")
        source: Any = self.source.load()
        layers = self.chosen(source.config)
        student = hybrid(source, layers, from_attention=self.start == "attention", seed=self.seed)
        if self.trains == "mixers":
            student.requires_grad_(False)
            for layer in replaced_layers(student.config):
                block = student.model.layers[layer]
                getattr(block, "mamba" if hasattr(block, "mamba") else "linear_attn").requires_grad_(True)
        return student

    def tokenizer(self) -> "PreTrainedTokenizerBase":
        return self.source.tokenizer()

    def describe(self) -> str:
        which = f"every {self.every}. layer" if self.layers is None else f"layers {self.layers}"
        return f"{self.source.describe()} with other mixers in {which}"
