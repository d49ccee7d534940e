"""vLLM as the model behind `kdlm serve`."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kdlm.models import Pretrained, Sandbox
from kdlm.signal import Head
from kdlm.teachers import VLLMTeacherSection


class EngineReader:
    """Runs a model in vLLM, which cuts and batches the sequences itself.

    Args:
        source: the model.
        options: handed to `vllm.LLM`.
    """

    def __init__(self, source: Pretrained | Sandbox, options: dict[str, Any]):
        section = VLLMTeacherSection(of=source, signal="hidden", options=options)
        self._teacher = section.build(torch.device("cpu"))
        assert self._teacher.head is not None, "hidden states come with a head"
        self.head: Head = self._teacher.head
        self.input_ids = self._teacher.vocab_size
        self.longest = self._teacher.engine.model_config.max_model_len

    def __call__(self, sequences: Sequence[tuple[Tensor, Tensor]]) -> Sequence[Tensor]:
        """Return the last hidden states at the rows of each sequence."""
        states = self._teacher.hidden([ids.tolist() for ids, _ in sequences])
        return [own[rows].to(self.head.weight.dtype) for own, (_, rows) in zip(states, sequences, strict=True)]
