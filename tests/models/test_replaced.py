"""A model whose attention is replaced in some layers is the source everywhere else, and opens without kdlm."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from kdlm.models import Predictor, Replaced
from kdlm.models.hybrids import hybrid, hybrid_config, replaced_layers

SIZES = {
    "vocab_size": 37,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "initializer_range": 0.3,
}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=None)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=True)),
}
IDS = torch.arange(1, 11)[None]


@pytest.fixture(params=MODELS)
def source(request: pytest.FixtureRequest):
    torch.manual_seed(0)
    model = MODELS[request.param]().eval()
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            torch.nn.init.normal_(parameter, 1.0, 0.2)
    return model


def mixer(student, layer: int):
    block = student.model.layers[layer]
    return block.mamba if hasattr(block, "mamba") else block.linear_attn


def test_no_layer_replaced_is_the_source_itself(source) -> None:
    ours, theirs = hybrid(source, []).eval()(IDS).logits, source(IDS).logits
    assert (ours - theirs).abs().max() <= 1e-6 * theirs.abs().max()


def test_a_kept_layer_gives_what_it_gave_for_the_same_input(source) -> None:
    student = hybrid(source, [1]).eval()
    x, at = torch.randn(2, 7, 32), torch.arange(7)[None]
    for layer in (0, 2, 3):
        there = source.model.layers[layer](x, position_embeddings=source.model.rotary_emb(x, at))
        turned = student.model.rotary_emb(x, at.expand(3, 1, -1) if source.config.model_type == "qwen3" else at)
        here = student.model.layers[layer](x, position_embeddings=turned)
        here, there = (one[0] if isinstance(one, tuple) else one for one in (here, there))
        torch.testing.assert_close(here, there, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(student.lm_head.weight, source.lm_head.weight)


def test_a_mixer_begins_as_the_attention_it_stands_for(source) -> None:
    student, attention = hybrid(source, [1]), source.model.layers[1].self_attn
    heads, width = 4, attention.head_dim
    k, v = (
        one.weight.unflatten(0, (2, width)).repeat_interleave(2, 0).flatten(0, 1)
        for one in (attention.k_proj, attention.v_proj)
    )
    q, inside = attention.q_proj.weight, mixer(student, 1)
    torch.testing.assert_close(inside.out_proj.weight, attention.o_proj.weight)
    if hasattr(inside, "in_proj_qkv"):
        ours = inside.in_proj_qkv.weight.split(heads * width)
        q, k = (w * norm.weight.repeat(heads)[:, None] for w, norm in ((q, attention.q_norm), (k, attention.k_norm)))
    else:
        _, x, b, c, _ = inside.in_proj.weight.split([heads * width] * 4 + [heads])
        ours = (c, b, x)
    for mine, whose in zip(ours, (q, k, v), strict=True):
        torch.testing.assert_close(mine, whose)


def test_a_mixer_of_the_present_token_says_what_its_projections_say(source) -> None:
    """One token has one value: with a state that holds nothing else, a head's output points where the value points."""
    student, attention = hybrid(source, [1]), source.model.layers[1].self_attn
    inside, x = mixer(student, 1), torch.randn(1, 1, 32)
    written = {}
    inside.out_proj.register_forward_pre_hook(lambda module, args: written.update(y=args[0]))
    with torch.no_grad():
        inside(x)
        v = torch.nn.functional.silu(attention.v_proj(x)).unflatten(-1, (2, -1)).repeat_interleave(2, 2)[0, 0]
        y = written["y"].unflatten(-1, (4, -1))[0, 0]
        if hasattr(inside, "in_proj_z"):
            y = y / torch.nn.functional.silu(inside.in_proj_z(x)).unflatten(-1, (4, -1))[0, 0]
    assert torch.cosine_similarity(v, y).abs().min() > 0.999


def test_the_number_of_parameters_is_as_computed(source) -> None:
    student, attention = hybrid(source, [1, 3]), source.model.layers[1].self_attn
    heads, inner, removed = 4, 4 * attention.head_dim, sum(one.numel() for one in attention.parameters())
    if source.config.model_type == "qwen3":
        into = (4 * inner + 2 * heads) * 32  # q, k, v, z, a, b
        made = into + inner * 32 + 3 * inner * 4 + 2 * heads + attention.head_dim
        more = 2 * inner * 32  # the gates of two layers of attention
    else:
        into = (4 * inner + heads) * (32 + 1)  # z, x, B, C, the time step; biases
        made = into + (inner + 1) * 32 + 3 * inner * (4 + 1) + 3 * heads + inner
        more = 2 * 32 if source.config.model_type == "qwen2" else 0  # biases of two output projections
    assert student.num_parameters() == source.num_parameters() + 2 * (made - removed) + more


def test_the_folder_it_leaves_is_opened_by_transformers_alone(source, tmp_path) -> None:
    student = hybrid(source, [1, 2]).eval()
    student.save_pretrained(tmp_path)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert replaced_layers(opened.config) == [1, 2]
    torch.testing.assert_close(opened(IDS).logits, student(IDS).logits)


def test_generation_with_a_cache_equals_a_full_forward_for_every_token(source) -> None:
    student = hybrid(source, [0, 2]).eval()
    written = student.generate(IDS, max_new_tokens=8, do_sample=False, eos_token_id=None)
    for length in range(IDS.shape[1], written.shape[1]):
        assert student(written[:, :length], use_cache=False).logits[0, -1].argmax() == written[0, length]


def test_padding_changes_nothing(source) -> None:
    student = hybrid(source, [0, 2]).eval()
    alone = student(IDS).logits
    padded = torch.cat([IDS, torch.zeros(1, 4, dtype=torch.long)], 1)
    mask = (padded != 0).long()
    torch.testing.assert_close(student(padded, attention_mask=mask).logits[:, :10], alone, rtol=1e-4, atol=1e-4)


def test_methods_read_it_by_its_hidden_states(source) -> None:
    assert Predictor(hybrid(source, [1])).reads_hidden


def test_random_mixers_are_drawn_and_the_rest_is_the_source(source) -> None:
    one, same = (hybrid(source, [1], from_attention=False, seed=3) for _ in range(2))
    other, began = hybrid(source, [1], from_attention=False, seed=4), hybrid(source, [1])
    for key, value in one.state_dict().items():
        torch.testing.assert_close(value, same.state_dict()[key])
        if "layers.1." not in key or (".mamba." not in key and ".linear_attn." not in key):
            torch.testing.assert_close(value, began.state_dict()[key])
    assert not torch.equal(mixer(one, 1).out_proj.weight, mixer(other, 1).out_proj.weight)


def test_the_mixers_alone_are_trained_where_asked(tmp_path) -> None:
    MODELS["qwen3"]().save_pretrained(tmp_path)
    section = Replaced.model_validate(
        {"source": {"name": "pretrained", "path": str(tmp_path)}, "every": 2, "trains": "mixers"}
    )
    student = section.load()
    moved = {name for name, parameter in student.named_parameters() if parameter.requires_grad}
    assert moved and all(".1.linear_attn." in name or ".3.linear_attn." in name for name in moved)
    assert replaced_layers(section.config()) == [1, 3]


@pytest.mark.parametrize(
    ("config", "layers", "said"),
    [
        (LlamaConfig(**SIZES), [4], "student.layers: .4."),
        (LlamaConfig(**SIZES), [1, 1], "student.layers"),
        (LlamaConfig(**SIZES, head_dim=12), [1], "no multiple of the hidden size"),
        (MistralConfig(**SIZES, sliding_window=8), [1], "sliding window"),
        (Qwen2Config(**SIZES, use_sliding_window=True, max_window_layers=1), [1], "sliding window"),
    ],
)
def test_what_has_no_hybrid_is_refused(config, layers, said) -> None:
    with pytest.raises(ValueError, match=said):
        hybrid_config(config, layers)


def test_other_families_are_refused_by_name() -> None:
    from transformers import GPT2Config

    with pytest.raises(ValueError, match="not of gpt2"):
        hybrid_config(GPT2Config(), [0])


def test_what_mamba_2_writes_begins_with_the_size_of_the_values(source) -> None:
    """Of unit inputs, the root mean square of a head's values is that of what the head writes before the output."""
    if source.config.model_type == "qwen3":
        pytest.skip("gated DeltaNet's norm is shared by the heads")
    student, block = hybrid(source, [1]), source.model.layers[1]
    inside, x = mixer(student, 1), torch.randn(400, 1, 32)
    written = {}
    inside.out_proj.register_forward_pre_hook(lambda module, args: written.update(y=args[0]))
    with torch.no_grad():
        x = block.input_layernorm(x)
        inside(x)
        bias = block.self_attn.v_proj.bias
        v = block.self_attn.v_proj(x) - (0 if bias is None else bias)
    sizes = [
        one.unflatten(-1, (heads, -1)).square().mean((0, 1, 3)).sqrt() for one, heads in ((v, 2), (written["y"], 4))
    ]
    torch.testing.assert_close(sizes[1], sizes[0].repeat_interleave(2), rtol=0.15, atol=0)
