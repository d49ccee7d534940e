"""Methods on the student's own text, with language models: batches, padding and packing do not show in the gradient."""

from typing import Any

import pytest
import torch
from bigram import VOCAB, batch_of, texts, total
from transformers import LlamaConfig, LlamaForCausalLM

from kdlm.methods import DistiLLM2, TsdKD
from kdlm.models.prediction import Predictor

LENGTHS = [5, 19, 3, 17, 8, 2, 13, 9]
METHODS = {
    "distillm2": lambda: (DistiLLM2(), [False, True] * 4),
    "distillm2_curriculum": lambda: (DistiLLM2(curriculum=True), [False, True] * 4),
    "tsd_kd": lambda: (TsdKD(indirect_weight=1.0, candidates=5), [True] * 8),
}


def model(seed: int, hidden: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": 2, "num_attention_heads": 2}
    config: Any = {"vocab_size": VOCAB, "initializer_range": 0.3, **sizes}
    return LlamaForCausalLM(LlamaConfig(**config)).double()


@pytest.mark.parametrize("name", METHODS)
def test_how_sequences_are_batched_does_not_show(name):
    student = model(1, 16)
    nets = {"student": Predictor(student), "teacher": Predictor(model(2, 24).requires_grad_(False))}
    method, sampled = METHODS[name]()
    if name == "distillm2_curriculum":
        method.anchors = torch.tensor([1e-3, -1e-3])
    chosen = texts(LENGTHS, sampled=sampled)
    parameters = list(student.parameters())
    whole, *others = (
        torch.autograd.grad(total(method, nets, batches), parameters)
        for batches in (
            [batch_of(chosen)],
            [batch_of([text]) for text in chosen],
            [batch_of(chosen[:3]), batch_of(chosen[3:])],
            [batch_of(chosen, "padding_free")],
        )
    )
    assert max(gradient.abs().max() for gradient in whole) > 1e-3
    for other in others:
        torch.testing.assert_close(other, whole, rtol=1e-6, atol=1e-9)
