"""Masked language models: networks that fill in what is hidden of a text, seeing what is before it and behind."""

from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast, get_args

from kdlm.models.loading import Pretrained, StudentOptions, open_pretrained
from kdlm.section_loader import suggestion

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SandboxMasked = Literal["masked-teacher", "masked-student", "masked-tiny", "code-encoder", "code-encoder-small"]


class MaskedLanguageModel(Pretrained):
    """A masked language model: what `AutoModelForMaskedLM` opens, with a tokenizer that has a mask token."""

    name: Literal["masked_lm"] = "masked_lm"  # pyright: ignore[reportIncompatibleVariableOverride]
    path: str
    """Hub id, local folder, or `sandbox:masked-teacher`, `sandbox:masked-student`, `sandbox:masked-tiny`, and of code,
    not trained, `sandbox:code-encoder`, `sandbox:code-encoder-small`."""

    def location(self) -> str:
        """Return the hub id or folder; builds a sandbox model when it is missing. Raises ValueError for an unknown."""
        if not self.path.startswith("sandbox:"):
            return self.path
        from kdlm.sandbox import build

        name, names = self.path.removeprefix("sandbox:"), get_args(SandboxMasked)
        if name not in names:
            raise ValueError(
                f"the sandbox has no masked model {name!r}{suggestion(name, names) or '.'} It has: {names}"
            )
        return str(build(cast("SandboxMasked", name)))

    def load(self, **extra: Any) -> "PreTrainedModel":
        """Open the weights; the configuration then names the mask token. Raises ValueError where there is none."""
        from transformers import AutoModelForMaskedLM

        options = {"revision": self.revision, **self.options(), **extra}
        model = open_pretrained(AutoModelForMaskedLM, self.location(), **options)
        if getattr(model.config, "mask_token_id", None) is None:
            model.config.mask_token_id = self.tokenizer().mask_token_id
        if model.config.mask_token_id is None:
            raise ValueError(f"{self.path}: neither its configuration nor its tokenizer names a mask token")
        return model


class MaskedStudent(MaskedLanguageModel, StudentOptions):
    """A masked language model to train."""

    provides: ClassVar[frozenset[str]] = frozenset({"unmasking"})
    """What a method may need of the student."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"
    """Data type of the trained weights; float32 with `training.bf16` is the safe pair. `auto`: the checkpoint's own."""
