"""Vision-language models: a checkpoint with its processor, and which of its parts train."""

from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from pydantic import Field, model_validator

from kdlm.features import module_at
from kdlm.models.loading import Pretrained, StudentOptions, open_pretrained

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

SandboxVisionLanguage = Literal["digits-vlm-teacher", "digits-vlm-student"]


class VisionLanguage(Pretrained):
    """A model that reads images and text, with its processor (LLaVA, SmolVLM, Qwen-VL and their kin)."""

    name: Literal["vision_language"] = "vision_language"  # pyright: ignore[reportIncompatibleVariableOverride]
    path: str
    """Hub id (`llava-hf/llava-1.5-7b-hf`), local folder, `sandbox:digits-vlm-teacher` or `sandbox:digits-vlm-student`.
    It must hold a processor beside the weights."""

    @property
    def in_sandbox(self) -> str | None:
        """The name that the sandbox has for it. Raises ValueError for a sandbox model that there is not."""
        if not self.path.startswith("sandbox:"):
            return None
        name = self.path.removeprefix("sandbox:")
        if name not in get_args(SandboxVisionLanguage):
            known = ", ".join(get_args(SandboxVisionLanguage))
            raise ValueError(f"the sandbox has no vision-language model {name!r}. One of: {known}")
        return name

    def location(self) -> str:
        if (name := self.in_sandbox) is None:
            return self.path
        from kdlm.sandbox import build

        return str(build(name))

    def load(self, **extra: Any) -> "PreTrainedModel":
        """Open the weights. Raises ValueError naming the path when there is no such model."""
        from transformers import AutoModelForImageTextToText

        options = {"revision": self.revision, **self.options(), **extra}
        return open_pretrained(AutoModelForImageTextToText, self.location(), **options)

    def processor(self) -> "ProcessorMixin":
        """Open what turns images and text into the model's inputs. Raises ValueError where there is none."""
        from transformers import AutoProcessor

        code = self.trust_remote_code
        found = open_pretrained(AutoProcessor, self.location(), revision=self.revision, trust_remote_code=code)
        if not hasattr(found, "image_processor"):
            raise ValueError(f"{self.path}: there is no processor of images beside the tokenizer")
        return found

    def tokenizer(self) -> "PreTrainedTokenizerBase":
        return self.processor().tokenizer  # type: ignore[attr-defined]


class VisionLanguageStudent(VisionLanguage, StudentOptions):
    """A model to train that reads images and text, whole or in some of its parts."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"
    """Data type of the trained weights; float32 with `training.bf16` is the safe pair. `auto`: the checkpoint's own."""
    weights: Literal["pretrained", "random"] = "pretrained"
    """`random` takes the configuration and the processor of `path` only, and draws new weights."""
    seed: int = 0
    """Seed of random weights."""
    trainable: list[str] | None = Field(None, min_length=1)
    """Dotted paths of the modules that train, e.g. [model.multi_modal_projector]; all others are frozen. By default the
    whole model trains."""

    @model_validator(mode="after")
    def _one_choice_of_what_trains(self) -> "VisionLanguageStudent":
        if self.trainable is not None and self.lora is not None:
            raise ValueError("trainable and lora both say what trains: keep one (lora.modules_to_save trains modules)")
        return self

    def load(self, **extra: Any) -> "PreTrainedModel":
        """Open or draw the weights, and freeze what does not train.

        Raises ValueError naming the path when there is no such model, or no such module in it.
        """
        model = super().load(**extra) if self.weights == "pretrained" else self._drawn()
        if self.trainable is not None:
            parts = [module_at(model, path) for path in self._known(model)]
            model.requires_grad_(False)
            for part in parts:
                part.requires_grad_(True)
        return model

    def _known(self, model: "PreTrainedModel") -> list[str]:
        for path in self.trainable or []:
            try:
                module = module_at(model, path)
            except ValueError as error:
                raise ValueError(f"student.trainable: {error}") from error
            if next(module.parameters(), None) is None:
                raise ValueError(f"student.trainable: the module {path!r} has no parameters to train")
        return self.trainable or []

    def _drawn(self) -> "PreTrainedModel":
        from transformers import AutoModelForImageTextToText

        extra = {} if self.attention == "auto" else {"attn_implementation": self.attention}
        dtype = torch.float32 if self.dtype == "auto" else getattr(torch, self.dtype)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return AutoModelForImageTextToText.from_config(self.config(), dtype=dtype, **extra)
