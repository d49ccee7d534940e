"""Students of few bits: linear layers whose weights are rounded to a grid in each pass and trained underneath it."""

from typing import Any

import torch
from pydantic import Field
from torch import nn

from kdlm.models.adaptive import refuse_parts
from kdlm.section import Section


class QuantizationAware(Section):
    """Train a student that is to be quantised as it will answer then (LLM-QAT, arXiv 2305.17888), through torchao.

    Each pass rounds the weights of a group to 2^bits values, evenly spaced between the least and the greatest of it.
    The gradient passes through the rounding as if it were not there (arXiv 1308.3432), and is 0 where a weight lies
    outside of the grid. The weights underneath stay in full precision, and are what checkpoints hold; the student that
    the run leaves has its weights on the grid, in a plain folder.
    """

    bits: int = Field(4, ge=2, le=8)
    """Bits of a weight."""
    group_size: int = Field(32, ge=2)
    """Weights of an output, side by side, that share a grid; must divide the inputs of every such layer."""
    symmetric: bool = False
    """Put the grid around 0, from -2^(bits-1) to 2^(bits-1) - 1 steps, in place of between the ends of the group."""
    activations: bool = False
    """Round what goes into the layers too, to 256 values between the ends of each token. A plain folder does not."""
    modules: list[str] | None = None
    """Endings of the names of the layers, e.g. [q_proj, mlp.down_proj]; by default every linear one but the head."""

    def configs(self) -> dict[str, Any]:
        """Return torchao's description of the grids. Raises ValueError without torchao."""
        try:
            from torchao.quantization import ZeroPointDomain
            from torchao.quantization.qat import IntxFakeQuantizeConfig
        except ImportError as error:
            raise ValueError("student.quantization_aware needs torchao: pip install 'kdlm[qat]'") from error
        # torchao 0.18 makes the grid between two ends for whole numbers from 0 and a zero point that is none; with its
        # defaults (signed, a whole zero point) it rounds to a grid that is not the group's.
        ends = {"zero_point_domain": ZeroPointDomain.FLOAT, "zero_point_precision": torch.float32}
        weight = IntxFakeQuantizeConfig(
            getattr(torch, f"{'int' if self.symmetric else 'uint'}{self.bits}"),
            group_size=self.group_size,
            is_symmetric=self.symmetric,
            **({} if self.symmetric else ends),
        )
        into = IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False) if self.activations else None
        return {"weight_config": weight, "activation_config": into}


def fake_quantise(model: Any, section: QuantizationAware) -> Any:
    """Put fake quantisation into `model`, in place, and return it; names and weights stay what they were.

    Raises ValueError for a name that no layer ends in, for a group size that does not divide a layer's inputs, and for
    adaptive layers.
    """
    refuse_parts(model, "quantization_aware")
    configs = section.configs()
    from torchao.quantization import quantize_
    from torchao.quantization.qat import QATConfig, QATStep

    chosen = _chosen(model, section)
    wrong = {name: layer.in_features for name, layer in chosen.items() if layer.in_features % section.group_size}
    if wrong:
        name, inputs = next(iter(wrong.items()))
        raise ValueError(
            f"student.quantization_aware.group_size: {section.group_size} does not divide the {inputs} inputs of {name}"
        )
    quantize_(model, QATConfig(**configs, step=QATStep.PREPARE), lambda _, name: name in chosen)
    return model


def _chosen(model: Any, section: QuantizationAware) -> dict[str, nn.Linear]:
    head = model.get_output_embeddings()
    linear = {
        name: module for name, module in model.named_modules() if type(module) is nn.Linear and module is not head
    }
    if section.modules is None:
        return linear
    ends = {one: {name for name in linear if f".{name}".endswith(f".{one}")} for one in section.modules}
    if missing := [one for one, names in ends.items() if not names]:
        raise ValueError(f"student.quantization_aware.modules: no linear layer but the head is called {missing[0]}")
    return {name: layer for name, layer in linear.items() if any(name in names for names in ends.values())}


@torch.no_grad()
def on_the_grid(model: Any) -> Any:
    """Turn layers with fake quantisation into plain ones whose weights lie on their grid, in place; return the model.

    It answers what it answered before, bit for bit, unless its activations were rounded too.
    """
    for module in list(model.modules()):
        for name, child in module.named_children():
            if (rounding := getattr(child, "weight_fake_quantizer", None)) is not None:
                rounded = rounding(child.weight)
                plain = child.to_linear()
                plain.weight = nn.Parameter(rounded, requires_grad=child.weight.requires_grad)
                setattr(module, name, plain)
    return model
