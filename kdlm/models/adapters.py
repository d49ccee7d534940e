"""LoRA and DoRA students, through PEFT."""

from typing import TYPE_CHECKING, Any

from pydantic import Field
from torch import nn

from kdlm.diffusion import Denoiser
from kdlm.models.adaptive import refuse_parts
from kdlm.models.frozen_copies import FrozenCopy
from kdlm.models.prediction import mask_id_of
from kdlm.section import Section

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel


class Lora(Section):
    """Train low-rank adapters and leave the student's own weights as they are (arXiv 2106.09685, DoRA 2402.09353)."""

    rank: int = Field(16, ge=1)
    """Rank of the update."""
    alpha: float = Field(32.0, gt=0)
    """The update is scaled by alpha / rank."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the adapter's input."""
    target_modules: str | list[str] = "all-linear"
    """Names of the modules to adapt; `all-linear` takes every linear layer but the head."""
    modules_to_save: list[str] = []
    """Modules trained in full and saved with the adapter, e.g. [lm_head, embed_tokens]."""
    dora: bool = False
    """Weight-decomposed LoRA: the magnitude is trained beside the direction."""
    export: str = Field("merged", pattern="^(merged|adapter)$")
    """What the run leaves behind: `merged` (a plain model folder) or `adapter` (the PEFT adapter alone). Of a base
    that was quantised while loading `merged` is the dequantised model in float32, so that nothing is rounded twice."""

    def check_export(self, *, averaged: bool) -> None:
        """Raise ValueError where the student, or the average of it that is handed out, cannot be exported so."""
        if averaged and self.export == "adapter":
            raise ValueError(
                "student.lora.export: an average is handed out, which is one of merged weights and has no adapter: "
                "set export: merged"
            )


def adapt(model: Any, lora: Lora) -> Any:
    """Return `model` with fresh adapters; only they (and `modules_to_save`) are trainable.

    A language model comes back inside PEFT's wrapper. A denoiser stays what it is, with adapters in it, and its
    checkpoints hold both. Raises ValueError for names that no module has, and for adaptive layers.
    """
    refuse_parts(model, "lora")
    from peft import get_peft_model, inject_adapter_in_model, prepare_model_for_kbit_training

    if getattr(model, "quantization_method", None) is not None:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    try:
        if isinstance(model, Denoiser):
            return inject_adapter_in_model(_config(lora), model)
        # A tied head and embedding stay one when they are trained in full.
        tied = bool(lora.modules_to_save) and model.config.get_text_config().tie_word_embeddings
        task = "CAUSAL_LM" if mask_id_of(model) is None else None  # PEFT has none for masked models
        return get_peft_model(model, _config(lora, ensure_weight_tying=tied, task_type=task))
    except ValueError as error:
        raise ValueError(f"student.lora.target_modules={lora.target_modules!r}: {error}") from error


def _config(lora: Lora, **options: Any) -> "LoraConfig":
    from peft import LoraConfig

    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # pyright: ignore[reportArgumentType]  a float works as well as an int
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        modules_to_save=lora.modules_to_save or None,
        use_dora=lora.dora,
        **options,
    )


def merge(model: "PeftModel | Denoiser") -> Any:
    """Return the base model with the adapters folded into its weights; the adapters are gone afterwards.

    A quantised base is dequantised to float32 first, in a copy: PEFT would quantise the sum again, and lose of the
    adapter what is smaller than a step.
    """
    if getattr(model, "quantization_method", None) is not None:
        return FrozenCopy(model).module
    if not isinstance(model, Denoiser):
        return model.merge_and_unload()
    _merge_inside(model)
    return model


def _merge_inside(module: nn.Module) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    for name, child in module.named_children():
        if isinstance(child, BaseTunerLayer):
            child.merge(safe_merge=True)
            setattr(module, name, child.get_base_layer())
        elif isinstance(child, ModulesToSaveWrapper):
            setattr(module, name, child.modules_to_save[child.active_adapters[0]])
        else:
            _merge_inside(child)
