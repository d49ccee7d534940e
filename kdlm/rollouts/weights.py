"""The student's weights as vLLM reads them: tensor by tensor, adapters merged, under the names of its checkpoint."""

import copy
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion


def named_weights(student: Any, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
    """Yield every weight of a student under the name that `save_pretrained` gives it.

    An adapted layer is copied, merged by PEFT and forgotten again, so there is never a second copy of the model; the
    student stays as it is. What is tied comes once.

    Args:
        student: a transformers model, or a PEFT model around one.
        dtype: what to cast to; by default each weight keeps its own.

    Raises ValueError for what has no plain weights: quantised layers, prompts that are learned, adapted tied weights.
    """
    if isinstance(student, PeftModel) and student.active_peft_config.is_prompt_learning:
        raise ValueError("student.peft: learned prompts are no weights that could be sent; use LoRA or its kin")
    base: Any = student.get_base_model() if isinstance(student, PeftModel) else student
    tied = Counter(id(weight) for _, weight in base.named_parameters(remove_duplicate=False))
    sent: set[int] = set()
    for name, source, weight in _merged(base, ""):
        if source is not weight and tied[id(source)] > 1:
            raise ValueError(
                f"student: {name} is tied to another weight and has an adapter: they cannot be sent as one"
            )
        if not weight.is_floating_point():
            raise ValueError(f"student: {name} is quantised ({weight.dtype}): rollouts in vLLM need plain weights")
        if id(source) in sent:
            continue
        sent.add(id(source))
        for saved, tensor in revert_weight_conversion(base, {name: weight.detach()}).items():
            yield saved, tensor.to(dtype or tensor.dtype)


def _merged(module: nn.Module, prefix: str) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield (name, the weight that lies below, the weight that counts), without the names of PEFT's wrappers."""
    if isinstance(module, BaseTunerLayer):
        below = dict(module.get_base_layer().named_parameters())
        merged = copy.deepcopy(module)
        merged.merge()
        for name, _, weight in _merged(merged.get_base_layer(), ""):
            yield prefix + name, below[name] if name in below else weight, weight
    elif isinstance(module, ModulesToSaveWrapper):
        below = dict(module.original_module.named_parameters())
        for name, _, weight in _merged(module.modules_to_save[module.active_adapters[0]], ""):
            yield prefix + name, below[name] if name in below else weight, weight
    elif isinstance(module, AuxiliaryTrainingWrapper):
        raise ValueError(
            f"student.peft: {prefix.rstrip('.')} ({type(module).__name__}) cannot be merged layer by layer"
        )
    else:
        own = module.named_parameters(recurse=False)
        kept = ((name, buffer) for name, buffer in module.named_buffers(recurse=False))
        rounded = getattr(module, "weight_fake_quantizer", None)  # of a student of few bits: what it answers with
        for name, weight in [*own, *(pair for pair in kept if pair[0] not in module._non_persistent_buffers_set)]:
            yield prefix + name, weight, weight if rounded is None or name != "weight" else rounded(weight)
        for name, child in module.named_children():
            yield from _merged(child, f"{prefix}{name}.")


def parameter_dtype(student: Any) -> torch.dtype:
    """Return the type of the student's first weight."""
    return next(weight.dtype for _, weight in named_weights(student))
