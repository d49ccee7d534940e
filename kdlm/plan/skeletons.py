"""Student and teacher without their weights: built from configurations, to run on fake tensors."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from kdlm.models import MaskedLanguageModel, adapt, fake_quantise
from kdlm.models.adaptive_student import make_adaptive
from kdlm.signal import Head, Hidden, LogProbs, Rows, Sampled, TopK
from kdlm.store import HiddenFormat, LogProbsFormat, SampledFormat, TopKFormat
from kdlm.teachers import (
    AheadTeacher,
    CachedTeacherSection,
    Ensemble,
    EnsembleSection,
    LocalTeacher,
    LocalTeacherSection,
    OpenAITeacherSection,
    SandboxTeacherSection,
    ServedTeacherSection,
    VLLMTeacherSection,
)

FLASH = ("flash_attention_2", "flash_attention_3")
"""Attention that is told of padding by lengths: no mask is made."""
BITS = {"4bit": 4.127, "8bit": 8.0}
"""Bits of a weight that bitsandbytes has quantised: nf4 with its scales, quantised too; int8 (scales: one a row)."""


def student_of(section: Any) -> Any:
    """Return a recipe's student, with its adapters or its rounding, as `kdlm train` would train it."""
    model = skeleton(section)
    if section.quantization_aware is not None:
        return fake_quantise(model, section.quantization_aware)
    return model if section.lora is None else adapt(model, section.lora)


def skeleton(section: Any) -> Any:
    """Return the model of a section of text models, with weights that have no numbers in them.

    Raises ValueError where there is no such configuration.
    """
    from transformers import AutoModelForCausalLM

    if isinstance(section, MaskedLanguageModel):
        raise ValueError("student: plan knows causal language models, and this is a masked one")
    loading = getattr(section, "source", section)
    config = configuration(section)
    attention = "eager" if loading.attention == "eager" else None  # all others hold what sdpa holds
    dtype = config.dtype or torch.float32 if loading.dtype == "auto" else getattr(torch, loading.dtype)
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    trusted = getattr(loading, "trust_remote_code", False)
    options = {} if attention is None else {"attn_implementation": attention}
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trusted, **options)
    if getattr(config, "adaptive", None):
        make_adaptive(model)
    if (kind := getattr(loading, "quantization", "none")) != "none":
        quantise(model, BITS[kind])
        model.quantization_method = "bitsandbytes"  # adapters on it are told by this to cast the rest to float32
    return model


def configuration(section: Any) -> Any:
    """Open a section's configuration, outside of all modes: the sandbox may build a model for it, with numbers."""
    with _disable_current_modes():
        return section.config()


def quantise(model: Any, bits: float) -> None:
    """Put weights of so many bits into all linear layers but the head, in place."""
    head = model.get_output_embeddings()
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Linear and child is not head:
                setattr(module, name, Quantised(child, bits))


class Quantised(nn.Linear):
    """Holds what a quantised layer holds; its weight is made anew in each product and not kept for the backward one."""

    def __init__(self, layer: nn.Linear, bits: float):
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.wide = layer.in_features, layer.out_features, layer.weight.dtype
        size = math.ceil(layer.weight.numel() * bits / 8)
        self.weight = nn.Parameter(torch.empty(size, 1, dtype=torch.uint8), requires_grad=False)
        self.bias = layer.bias

    def forward(self, input: Tensor) -> Tensor:
        shape = self.out_features, self.in_features
        out = _Dequantised.apply(input, shape, self.wide)
        return out if self.bias is None else out + self.bias


class _Dequantised(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, shape, dtype):
        ctx.shape, ctx.dtype = shape, dtype
        return nn.functional.linear(x.to(dtype), x.new_empty(shape, dtype=dtype)).to(x.dtype)

    @staticmethod
    def backward(ctx, upstream):
        return upstream @ upstream.new_empty(ctx.shape), None, None


def teacher_of(section: Any, rows: int, ahead: int) -> Any:
    """Return what answers in a recipe's teacher's place.

    Args:
        rows: kept rows of a micro-batch.
        ahead: batches whose signals are in memory at once, where they are read with the batch.

    Raises ValueError for a teacher that cannot be planned.
    """
    match section:
        case None:
            return None
        case EnsembleSection():
            members = [teacher_of(member, rows, ahead) for member in section.members]
            return Ensemble(members, space=section.space)
        case LocalTeacherSection() | SandboxTeacherSection() if section.device in (None, "auto"):
            model = skeleton(section)
            if (sliced := section.placement == "sliced") or section.batch_size is not None:
                return AheadTeacher(model, section.signal, sliced=sliced, batch_size=section.batch_size)
            return LocalTeacher(model, section.signal)
        case LocalTeacherSection() | SandboxTeacherSection():
            return Elsewhere(section, HiddenFormat(dtype="bfloat16"), rows, 0)
        case ServedTeacherSection():
            return Elsewhere(section.of, HiddenFormat(dtype="bfloat16"), rows, ahead)
        case OpenAITeacherSection() | VLLMTeacherSection():
            form = TopKFormat(k=section.k, tail_draws=0) if section.k else LogProbsFormat()
            return Elsewhere(section.of, form, rows, ahead)
        case CachedTeacherSection():
            return Elsewhere(section, section.format, rows, ahead)
    raise ValueError(f"teacher: plan cannot follow a teacher of name {section.name}")


class Elsewhere:
    """A teacher whose weights are not in this memory: its signals come from disk, from a server, another device."""

    provides = frozenset({"teacher"})

    def __init__(self, section: Any, form: Any, rows: int, ahead: int):
        self.form = form
        config = configuration(section).get_text_config()
        self.vocab_size = config.vocab_size
        self.head = None
        if isinstance(form, HiddenFormat):
            if not hasattr(config, "hidden_size"):
                raise ValueError("teacher.of: plan reads the width of the hidden states there: name the captured model")
            dtype = getattr(torch, form.dtype) if form.dtype != "float8" else torch.bfloat16
            self.head = Head(torch.empty(config.vocab_size, config.hidden_size, dtype=dtype))
        self.ahead = [self._record(rows) for _ in range(ahead)]
        self.size = sum(tensor.nbytes for tensor in self._record(rows).values())
        """Bytes of a micro-batch's signals."""

    @property
    def signals(self) -> frozenset[type]:
        return frozenset({self.form.kind})

    def __call__(self, batch: dict[str, Tensor], rows: Rows) -> Any:
        ready = bool(self.ahead) and len(next(iter(self.ahead[0].values()))) == len(rows)
        record = self.ahead[0] if ready else self._record(len(rows))
        if self.head is not None:
            return Hidden(record["hidden"].to(self.head.weight.dtype), self.head)
        if "counts" in record:
            return Sampled(record["ids"], record["counts"])
        return TopK(record["ids"], record["log_probs"]) if "ids" in record else LogProbs(record["log_probs"])

    def _record(self, rows: int) -> dict[str, Tensor]:
        """Return the tensors of a batch's record, as `kdlm.store` reads them."""
        match self.form:
            case HiddenFormat():
                assert self.head is not None
                return {"hidden": self.head.weight.new_empty(rows, self.head.weight.shape[1])}
            case TopKFormat(k=k):
                ids = torch.empty(rows, k, dtype=torch.int64)
                return {"ids": ids, "log_probs": torch.empty(rows, k), "log_tail": torch.empty(rows)}
            case SampledFormat(draws=draws):
                seen = min(draws, 16)
                return {"ids": torch.empty(rows, seen, dtype=torch.int64), "counts": torch.empty(rows, seen)}
            case LogProbsFormat():
                return {"log_probs": torch.empty(rows)}
        raise ValueError(f"teacher.format: plan does not know {self.form.name}")
