"""The weights that an engine is sent are those that would be saved, adapters merged, and the student stays as it is."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, PreTrainedModel, Qwen3Config, Qwen3MoeConfig

from kdlm.rollouts.weights import named_weights, parameter_dtype

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
MODELS = {
    "tied": LlamaConfig(**SMALL, tie_word_embeddings=True),
    "untied": LlamaConfig(**SMALL, tie_word_embeddings=False, attention_bias=True),
    "qwen3": Qwen3Config(**SMALL, head_dim=16),
    "experts": Qwen3MoeConfig(**SMALL, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
    "renamed": MixtralConfig(**SMALL, num_local_experts=4),
}
ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": ["q_proj", "down_proj"]},
    "every linear layer": {"target_modules": "all-linear"},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "dora": {"target_modules": ["q_proj", "v_proj"], "use_dora": True},
    "bias": {"target_modules": ["q_proj"], "lora_bias": True},
    "trained whole": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]},
}


def model(name: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_config(MODELS[name])


def adapted(base: PreTrainedModel, **options: Any) -> Any:
    student = get_peft_model(base, LoraConfig(r=4, lora_alpha=16, init_lora_weights=False, **options))
    with torch.no_grad():
        for weight in student.parameters():
            if weight.requires_grad:
                weight.add_(0.1 * torch.randn_like(weight))
    return student


def assert_same(weights: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> None:
    assert weights.keys() == others.keys()
    for name, weight in weights.items():
        assert torch.equal(weight, others[name]), name


@pytest.mark.parametrize("name", MODELS)
def test_the_names_and_weights_are_those_that_are_saved(name: str, tmp_path: Path) -> None:
    student = model(name)
    student.save_pretrained(tmp_path)
    assert_same(dict(named_weights(student)), load_file(tmp_path / "model.safetensors"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_same(dict(named_weights(loaded)), load_file(tmp_path / "model.safetensors"))


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_an_adapter_is_merged_as_peft_merges_it(adapter: str, tmp_path: Path) -> None:
    student = adapted(model("untied"), **ADAPTERS[adapter])
    before = copy.deepcopy(student.state_dict())
    weights = dict(named_weights(student))
    assert_same(before, student.state_dict())
    assert any(weight.requires_grad for weight in student.parameters())
    copy.deepcopy(student).merge_and_unload().save_pretrained(tmp_path)
    assert_same(weights, load_file(tmp_path / "model.safetensors"))


def test_a_tied_model_with_an_adapter_elsewhere_is_merged(tmp_path: Path) -> None:
    student = adapted(model("tied"), target_modules=["q_proj"])
    weights = dict(named_weights(student))
    copy.deepcopy(student).merge_and_unload().save_pretrained(tmp_path)
    assert_same(weights, load_file(tmp_path / "model.safetensors"))


def test_no_second_copy_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    student = model("untied")
    own = {weight.data_ptr() for weight in student.parameters()}
    assert {weight.data_ptr() for _, weight in named_weights(student)} == own
    student = adapted(student, target_modules=["q_proj"])
    layers: list[Any] = []
    copied = copy.deepcopy
    monkeypatch.setattr(copy, "deepcopy", lambda layer: layers.append(layer) or copied(layer))
    counts = [len(layers) for _ in named_weights(student)]
    assert counts[0] == 0 and counts[-1] == 2 and 1 in counts  # a layer is merged when its turn comes


def test_weights_are_cast_where_that_is_asked() -> None:
    student = model("tied").to(torch.bfloat16)
    assert parameter_dtype(student) == torch.bfloat16
    assert {weight.dtype for _, weight in named_weights(student)} == {torch.bfloat16}
    assert {weight.dtype for _, weight in named_weights(student, torch.float32)} == {torch.float32}


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize("where", [{"target_modules": ["lm_head"]}, {"target_modules": ["embed_tokens"]}])
def test_an_adapter_on_a_tied_weight_is_refused(where: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="is tied to another weight and has an adapter"):
        list(named_weights(adapted(model("tied"), **where)))


def test_what_has_no_plain_weights_is_refused() -> None:
    prompted = get_peft_model(model("untied"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ValueError, match="learned prompts"):
        list(named_weights(prompted))
    student: Any = model("untied")
    packed = torch.zeros(8, dtype=torch.uint8)
    student.lm_head.weight = torch.nn.Parameter(packed, requires_grad=False)
    with pytest.raises(ValueError, match=r"lm_head\.weight is quantised"):
        list(named_weights(student))
    rows = adapted(model("untied"), target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [1, 2]})
    with pytest.raises(ValueError, match=r"embed_tokens .*cannot be merged"):
        list(named_weights(rows))


def test_a_student_of_few_bits_is_sent_as_it_answers() -> None:
    pytest.importorskip("torchao", reason="torchao is not installed")
    from kdlm.models import fake_quantise, on_the_grid
    from kdlm.models.fake_quantised import QuantizationAware

    student = fake_quantise(model("untied"), QuantizationAware(bits=2, group_size=16))
    sent = dict(named_weights(student))
    plain = on_the_grid(copy.deepcopy(student)).state_dict()
    assert sent.keys() == plain.keys() and all(torch.equal(sent[name], plain[name]) for name in plain)
    assert not torch.equal(sent["model.layers.0.mlp.up_proj.weight"], student.model.layers[0].mlp.up_proj.weight)
