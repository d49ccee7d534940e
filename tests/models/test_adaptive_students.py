"""An adaptive layer is the source's with all its learners, and costs what its gate says with fewer."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from kdlm.models import (
    Adaptive,
    Lora,
    Predictor,
    Pretrained,
    Pruned,
    Replaced,
    adapt,
    adaptive_layers,
    chosen,
    fake_quantise,
)
from kdlm.models.adaptive import AdaptiveMLP
from kdlm.models.fake_quantised import QuantizationAware

SIZES = {
    "vocab_size": 37,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "initializer_range": 0.3,
}
MODELS = {
    "llama with biases": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, mlp_bias=True)),
    "qwen3 with tied head": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=8, tie_word_embeddings=True)),
}
IDS = torch.arange(1, 11)[None]
FEW = QuantizationAware(group_size=16)


@pytest.fixture(params=MODELS)
def folder(request: pytest.FixtureRequest, tmp_path):
    torch.manual_seed(0)
    MODELS[request.param]().save_pretrained(tmp_path / "source")
    return tmp_path / "source"


def student(folder, **options):
    return Adaptive.model_validate({"source": {"name": "pretrained", "path": str(folder)}, **options}).load().eval()


def layer(learners: int = 4, *, bias: bool = False) -> tuple[LlamaMLP, AdaptiveMLP]:
    torch.manual_seed(1)
    dense, same = (LlamaMLP(LlamaConfig(**SIZES, mlp_bias=bias)).double() for _ in range(2))
    same.load_state_dict(dense.state_dict())
    ours = AdaptiveMLP(same, learners, 8)
    ours.order()
    return dense, ours


def choosing(ours: AdaptiveMLP) -> AdaptiveMLP:
    """Let the gate choose differently for different tokens."""
    torch.nn.init.normal_(ours.choice[2].weight, std=3.0)
    ours.choice[2].bias.data.zero_()
    return ours


def test_with_all_learners_it_is_the_source(folder) -> None:
    ours = student(folder)
    source = AutoModelForCausalLM.from_pretrained(folder).eval()
    torch.testing.assert_close(ours(IDS).logits, source(IDS).logits, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(ours(IDS).logits, source(IDS).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bias", [False, True])
def test_the_sum_of_all_learners_is_the_dense_layer_and_the_first_are_the_strongest(bias) -> None:
    dense, ours = layer(bias=bias)
    x = torch.randn(50, 32, dtype=torch.float64)
    torch.testing.assert_close(ours.sums(x)[:, -1], dense(x))
    errors = (ours.sums(x) - dense(x)[:, None]).square().mean((0, 2))
    assert (errors[1:] < errors[:-1]).all()


@pytest.mark.parametrize("bias", [False, True])
def test_grouped_tokens_masked_learners_and_prefix_sums_agree(bias) -> None:
    ours = choosing(layer(bias=bias)[1])
    x = torch.randn(3, 20, 32, dtype=torch.float64)
    k = ours.choice(x).argmax(-1)
    assert set(k.unique().tolist()) == {0, 1, 2, 3, 4}
    masked = ours(x)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), masked)
    sums = torch.nn.functional.pad(ours.sums(x.flatten(0, 1)), (0, 0, 1, 0))
    if bias:
        sums[:, 0] = ours.down_proj.bias
    torch.testing.assert_close(sums[torch.arange(60), k.flatten()], masked.flatten(0, 1))


def test_a_learner_computes_for_the_tokens_alone_that_use_it(monkeypatch) -> None:
    ours, x = choosing(layer()[1]), torch.randn(60, 32, dtype=torch.float64)
    k, real, rows = ours.choice(x).argmax(-1), torch.nn.functional.linear, []
    monkeypatch.setattr(
        "torch.nn.functional.linear", lambda a, w, b=None: rows.append((len(a), len(w))) or real(a, w, b)
    )
    with torch.no_grad():
        ours(x)
    down = [count for count, out in rows if out == 32]
    assert sum(down) == int(k.sum()) < 4 * 60


def test_the_choice_is_one_hot_and_its_gradient_is_not_zero() -> None:
    logits = torch.randn(7, 5, requires_grad=True)
    choice = chosen(logits, torch.randn(7, 5))
    assert torch.equal(choice.detach().sort(-1).values, torch.tensor([[0.0, 0, 0, 0, 1]]).expand(7, 5))
    ours, x = choosing(layer()[1]), torch.randn(9, 32, dtype=torch.float64)
    ours(x).square().sum().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in ours.choice.parameters())


def test_the_folder_it_leaves_comes_back_with_its_gates_and_opens_without_them(folder, tmp_path) -> None:
    ours = student(folder, learners=3, layers=[1])
    for one in adaptive_layers(ours).values():
        choosing(one)
    ours.save_pretrained(tmp_path / "left")
    written = json.loads((tmp_path / "left" / "config.json").read_text())
    assert written["adaptive"] == {"layers": [1], "learners": 3}
    opened = Pretrained(path=str(tmp_path / "left")).load().eval()
    with torch.no_grad():
        torch.testing.assert_close(opened(IDS).logits, ours(IDS).logits)
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "left").eval()
        source = AutoModelForCausalLM.from_pretrained(folder).eval()
        torch.testing.assert_close(plain(IDS).logits, source(IDS).logits, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(opened(IDS).logits, source(IDS).logits, rtol=1e-2)


def test_generation_with_a_cache_equals_full_forwards_token_by_token(folder) -> None:
    ours = student(folder)
    for one in adaptive_layers(ours).values():
        choosing(one)
    written = ours.generate(IDS, max_new_tokens=8, do_sample=False, eos_token_id=None)
    with torch.no_grad():
        for length in range(IDS.shape[1], written.shape[1]):
            assert ours(written[:, :length], use_cache=False).logits[0, -1].argmax() == written[0, length]


def test_methods_read_it_by_its_hidden_states(folder) -> None:
    assert Predictor(student(folder)).reads_hidden


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"learners": 5}, "student.learners: 48 neurons are not divided by 5"),
        ({"layers": [2]}, "student.layers: .2."),
        ({"layers": []}, "student.layers"),
    ],
)
def test_what_cannot_be_divided_is_refused(folder, options, said) -> None:
    with pytest.raises(ValueError, match=said):
        student(folder, **options)


def test_an_adaptive_model_is_not_divided_twice(folder, tmp_path) -> None:
    student(folder).save_pretrained(tmp_path / "left")
    with pytest.raises(ValueError, match="adaptive already"):
        student(tmp_path / "left")
    source = {"name": "pretrained", "path": str(tmp_path / "left")}
    for section in (Pruned(source=source, layers=1), Replaced(source=source, layers=[1])):
        with pytest.raises(ValueError, match=r"student\.source: its layers are adaptive"):
            section.load()


@pytest.mark.parametrize(
    ("put", "key"), [(lambda it: adapt(it, Lora()), "lora"), (lambda it: fake_quantise(it, FEW), "quantization_aware")]
)
def test_what_is_put_on_whole_layers_is_refused_also_on_a_folder_that_was_left(folder, tmp_path, put, key) -> None:
    student(folder).save_pretrained(tmp_path / "left")
    with pytest.raises(ValueError, match=rf"student\.{key}: the layers are adaptive"):
        put(Pretrained(path=str(tmp_path / "left")).load())
