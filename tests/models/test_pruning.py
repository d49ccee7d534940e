"""A pruned student is made of the source's own weights."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from kdlm.models import Pruned
from kdlm.models.pruned import Width
from kdlm.models.pruning import kept_layers, prune

SIZES = {
    "vocab_size": 37,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "qwen2 with biases": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "qwen3 with tied head": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=8, tie_word_embeddings=True)),
}
IDS = torch.arange(1, 11)[None]


@pytest.fixture(params=MODELS)
def source(request: pytest.FixtureRequest):
    torch.manual_seed(0)
    return MODELS[request.param]().eval()


def test_nothing_cut_is_the_source_itself(source) -> None:
    same = prune(source, None, Width()).eval()
    torch.testing.assert_close(same(IDS).logits, source(IDS).logits)


def test_kept_layers_run_as_they_did_in_the_source(source) -> None:
    keep = [0, 2, 5]
    student = prune(source, keep, Width()).eval()
    source.model.layers = torch.nn.ModuleList(source.model.layers[i] for i in keep)
    source.config.num_hidden_layers = len(keep)
    torch.testing.assert_close(student(IDS).logits, source(IDS, use_cache=False).logits)


def test_silent_neurons_and_heads_are_cut_without_a_trace(source) -> None:
    """Where the source does not use a neuron or head, the narrower student computes the same."""
    with torch.no_grad():
        for layer in source.model.layers:
            layer.mlp.down_proj.weight[:, ::2] = 0
            layer.self_attn.o_proj.weight[:, :16] = 0  # heads 0 and 1: the first key-value group
    width = Width(intermediate_size=24, num_attention_heads=2, num_key_value_heads=1)
    student = prune(source, None, width).eval()
    assert student.num_parameters() < source.num_parameters()
    torch.testing.assert_close(student(IDS).logits, source(IDS).logits, rtol=1e-4, atol=1e-5)


def test_a_narrow_residual_stream_runs_and_keeps_the_strongest_channels(source) -> None:
    with torch.no_grad():
        source.model.embed_tokens.weight[:, 8:] *= 10
    student = prune(source, 2, Width(hidden_size=24)).eval()
    assert student(IDS).logits.shape == (1, 10, 37)
    torch.testing.assert_close(student.model.embed_tokens.weight, source.model.embed_tokens.weight[:, 8:])


def test_a_number_of_layers_is_spread_from_first_to_last() -> None:
    assert kept_layers(3, 9) == [0, 4, 8]
    assert kept_layers(1, 9) == [0]
    assert kept_layers(None, 3) == [0, 1, 2]


@pytest.mark.parametrize(
    ("layers", "width", "named"),
    [
        (7, {}, "student.layers: 7"),
        ([0, 0], {}, "student.layers"),
        ([6], {}, "student.layers"),
        (None, {"hidden_size": 64}, "student.width.hidden_size: 64"),
        (None, {"num_attention_heads": 3}, "student.width: 3 query heads"),
    ],
)
def test_what_cannot_be_cut_is_refused_by_name(layers, width, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        prune(MODELS["llama"](), layers, Width(**width))


def test_a_recipes_pruned_student_opens_its_source(tmp_path) -> None:
    torch.manual_seed(0)
    MODELS["llama"]().save_pretrained(tmp_path)
    section = Pruned.model_validate(
        {"name": "pruned", "source": {"name": "pretrained", "path": str(tmp_path)}, "layers": 2}
    )
    assert section.load().config.num_hidden_layers == 2
    assert section.config().num_hidden_layers == 2
