"""LoRA and DoRA students, through PEFT."""

from typing import TYPE_CHECKING

from pydantic import Field

from kdlm.section import Section

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


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
    """What the run leaves behind: `merged` (a plain model folder) or `adapter` (the PEFT adapter alone)."""


def adapt(model: "PreTrainedModel", lora: Lora) -> "PeftModel":
    """Return `model` with fresh adapters; only they (and `modules_to_save`) are trainable."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    if getattr(model, "quantization_method", None) is not None:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    targets = lora.target_modules
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # pyright: ignore[reportArgumentType]  a float works as well as an int
        lora_dropout=lora.dropout,
        target_modules=targets,
        modules_to_save=lora.modules_to_save or None,
        use_dora=lora.dora,
        # A tied head and embedding stay one when they are trained in full.
        ensure_weight_tying=bool(lora.modules_to_save) and model.config.get_text_config().tie_word_embeddings,
        task_type="CAUSAL_LM",
    )
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise ValueError(f"student.lora.target_modules={targets!r}: {error}") from error


def merge(model: "PeftModel") -> "PreTrainedModel":
    """Return the base model with the adapters folded into its weights; the adapters are gone afterwards."""
    return model.merge_and_unload()
