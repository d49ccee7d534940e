"""A Predictor's signal must be the model's own logits, whatever the model does between hidden state and logits."""

import pytest
import torch
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, GraniteConfig, LlamaConfig, Qwen3Config

from kdlm.losses import kept_rows
from kdlm.models import Lora, Predictor, adapt
from kdlm.models.prediction import decoder_layers
from kdlm.signal import Dense, Hidden

SIZES = {
    "vocab_size": 37,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "tied": Qwen3Config(**SIZES, head_dim=8, tie_word_embeddings=True),
    "softcap": Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=3.0),
    "logit_scale": CohereConfig(**SIZES, logit_scale=0.3),
    "logits_scaling": GraniteConfig(**SIZES, logits_scaling=4.0),
}


@pytest.fixture(params=CONFIGS)
def model(request: pytest.FixtureRequest):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[request.param]).eval()


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 37, (2, 9))
    labels = ids.clone()
    labels[0, :4] = -100
    mask = torch.ones_like(ids)
    mask[1, 6:], labels[1, 6:] = 0, -100
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def own_logits(model, batch):
    rows = kept_rows(batch["labels"])
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return rows, rows.select(logits)


def test_hidden_and_head_give_the_models_own_logits(model, batch) -> None:
    rows, expected = own_logits(model, batch)
    signal = Predictor(model)(batch, rows)
    assert isinstance(signal, Hidden)
    torch.testing.assert_close(signal.head.logits(signal.hidden), expected, rtol=1e-5, atol=1e-5)


def test_layers_are_the_models_hidden_states(model, batch) -> None:
    rows = kept_rows(batch["labels"])
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    expected = model(**inputs, output_hidden_states=True).hidden_states
    hooks = [len(layer._forward_hooks) for layer in decoder_layers(model)]  # transformers leaves its own
    _, hidden = Predictor(model).with_layers(batch, rows, [0, 1])
    for got, layer in zip(hidden, (1, 2), strict=True):
        torch.testing.assert_close(got, rows.select(expected[layer]))
    assert [len(layer._forward_hooks) for layer in decoder_layers(model)] == hooks


@pytest.mark.parametrize("dora", [False, True])
def test_adapters_on_the_linear_layers_are_seen(batch, dora: bool) -> None:
    torch.manual_seed(0)
    adapted = adapt(AutoModelForCausalLM.from_config(CONFIGS["llama"]), Lora(rank=4, dora=dora)).eval()
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    rows, expected = own_logits(adapted, batch)
    signal = Predictor(adapted)(batch, rows)
    assert isinstance(signal, Hidden)
    torch.testing.assert_close(signal.head.logits(signal.hidden), expected, rtol=1e-5, atol=1e-5)


def test_an_adapter_on_the_head_is_read_through_the_models_own_forward(batch) -> None:
    torch.manual_seed(0)
    lora = Lora(rank=4, target_modules=["q_proj", "lm_head"])
    adapted = adapt(AutoModelForCausalLM.from_config(CONFIGS["llama"]), lora).eval()
    torch.nn.init.normal_(adapted.get_output_embeddings().lora_B["default"].weight)
    rows, expected = own_logits(adapted, batch)
    signal = Predictor(adapted)(batch, rows)
    assert isinstance(signal, Dense)
    torch.testing.assert_close(signal.logits, expected)


def test_a_trained_copy_of_the_head_is_the_one_that_is_read(batch) -> None:
    torch.manual_seed(0)
    lora = Lora(rank=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    adapted = adapt(AutoModelForCausalLM.from_config(CONFIGS["llama"]), lora).eval()
    torch.nn.init.normal_(adapted.get_output_embeddings().modules_to_save["default"].weight)
    rows, expected = own_logits(adapted, batch)
    signal = Predictor(adapted)(batch, rows)
    assert isinstance(signal, Hidden)
    torch.testing.assert_close(signal.head.logits(signal.hidden), expected, rtol=1e-5, atol=1e-5)


def test_a_model_with_an_unknown_last_step_falls_back_to_its_own_logits(batch) -> None:
    class Odd(type(AutoModelForCausalLM.from_config(CONFIGS["llama"]))):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = out.logits + torch.arange(out.logits.shape[-1])
            return out

    model = Odd(CONFIGS["llama"]).eval()
    rows, expected = own_logits(model, batch)
    signal = Predictor(model)(batch, rows)
    assert isinstance(signal, Dense)
    torch.testing.assert_close(signal.logits, expected)
