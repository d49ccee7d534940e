"""The base of a model that trains adapters is read as if it had none, and nothing of the model is changed by that."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kdlm.losses import kept_rows
from kdlm.models import Lora, Predictor, WithoutAdapters, adapt

CONFIG = LlamaConfig(
    vocab_size=37, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, bos_token_id=1, eos_token_id=2,
)  # fmt: skip


@pytest.mark.parametrize("lora", [Lora(rank=2), Lora(rank=2, dora=True), Lora(rank=2, modules_to_save=["lm_head"])])
def test_without_adapters_a_student_answers_as_its_base_however_far_it_has_trained(lora: Lora) -> None:
    torch.manual_seed(0)
    base = LlamaForCausalLM(CONFIG).eval()
    ids = torch.randint(3, 37, (2, 6))
    batch, rows = {"input_ids": ids, "labels": ids}, kept_rows(ids)
    before = Predictor(base)(batch, rows)
    expected = before.head.logits(before.hidden).detach()
    student = adapt(base, lora).eval()
    trained = {name for name, parameter in student.named_parameters() if parameter.requires_grad}
    with torch.no_grad():
        for parameter in student.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    signal = WithoutAdapters(student)(batch, rows)
    torch.testing.assert_close(signal.head.logits(signal.hidden), expected)
    now = Predictor(student)(batch, rows)
    assert not torch.allclose(now.head.logits(now.hidden), expected)
    assert {name for name, parameter in student.named_parameters() if parameter.requires_grad} == trained
