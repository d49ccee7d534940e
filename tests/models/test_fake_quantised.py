"""A student of few bits answers as the rounded model does, and what lies underneath trains."""

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

pytest.importorskip("torchao", reason="torchao is not installed")

from kdlm.models import FrozenCopy, fake_quantise, on_the_grid
from kdlm.models.fake_quantised import QuantizationAware

IDS = torch.arange(3, 35).view(2, 16)
GRIDS = [(bits, symmetric) for bits in (2, 3, 4, 8) for symmetric in (False, True)]


@pytest.fixture(scope="module")
def whole() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, num_key_value_heads=1, **sizes)).eval()


def prepared(whole: Any, **options: Any) -> Any:
    return fake_quantise(copy.deepcopy(whole), QuantizationAware(**{"group_size": 16, **options}))


def rounded(model: Any) -> Any:
    return on_the_grid(copy.deepcopy(model))


def linear(model: Any) -> dict[str, nn.Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


@pytest.mark.parametrize(("bits", "symmetric"), GRIDS)
def test_each_group_lies_on_an_even_grid_of_so_many_values(whole: Any, bits: int, symmetric: bool) -> None:
    layers = linear(rounded(prepared(whole, bits=bits, symmetric=symmetric)))
    for name, layer in layers.items():
        if name == "lm_head":
            continue
        before = linear(whole)[name].weight.view(-1, 16)
        for group, origin in zip(layer.weight.detach().view(-1, 16), before.detach(), strict=True):
            if symmetric:  # torchao's: the greatest magnitude is (2^bits - 1) / 2 steps
                step, zero = origin.abs().max() / (2**bits - 1) * 2, 0.0
            else:
                step, zero = (origin.max() - origin.min()) / (2**bits - 1), origin.min()
            places = (group - zero) / step
            assert (places - places.round()).abs().max() < 1e-3
            assert places.round().unique().numel() <= 2**bits
            # Around 0 the greatest weight may lie half a step beyond the grid; its ends are otherwise the group's.
            assert (group - origin).abs().max() <= step / 2 * (1 + 1e-4)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_rounding_what_is_rounded_changes_nothing(whole: Any, bits: int) -> None:
    once = rounded(prepared(whole, bits=bits))
    twice = rounded(prepared(once, bits=bits))
    for name, layer in linear(once).items():
        torch.testing.assert_close(linear(twice)[name].weight, layer.weight, rtol=1e-5, atol=1e-7)


def test_each_bit_brings_it_nearer_to_the_whole_model_and_eight_all_but_there(whole: Any) -> None:
    theirs = whole(IDS).logits
    gaps = [(prepared(whole, bits=bits)(IDS).logits - theirs).norm() / theirs.norm() for bits in (2, 4, 6, 8)]
    assert all(after < before / 2 for before, after in pairwise(gaps))
    assert gaps[-1] < 0.01


@pytest.mark.parametrize(("bits", "symmetric"), GRIDS)
def test_the_exported_model_answers_bit_for_bit_as_the_one_that_trained(
    whole: Any, bits: int, symmetric: bool, tmp_path
) -> None:
    model = prepared(whole, bits=bits, symmetric=symmetric)
    theirs = model(IDS).logits
    plain = rounded(model)
    assert all(type(layer) is nn.Linear for layer in linear(plain).values())
    assert torch.equal(plain(IDS).logits, theirs)
    plain.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(IDS).logits, theirs)


def test_the_gradient_passes_through_the_rounding_as_if_it_were_not_there(whole: Any) -> None:
    model = prepared(whole, bits=3)
    plain = rounded(model)
    for one in (model, plain):
        one.zero_grad()
        one(input_ids=IDS, labels=IDS).loss.backward()
    for name, layer in linear(plain).items():
        torch.testing.assert_close(linear(model)[name].weight.grad, layer.weight.grad, rtol=1e-5, atol=1e-8)


def test_around_zero_the_gradient_stops_at_weights_beyond_the_grid(whole: Any) -> None:
    model = prepared(whole, bits=2, symmetric=True)
    layer = linear(model)["model.layers.0.mlp.up_proj"]
    model(input_ids=IDS, labels=IDS).loss.backward()
    groups = layer.weight.detach().view(-1, 16)
    places = (groups / groups.abs().amax(1, keepdim=True) * 1.5).view_as(layer.weight)  # the grid is -2, -1, 0, 1
    stopped = layer.weight.grad == 0
    assert stopped.any() and (places[stopped] > 1.499).all()
    assert not stopped[places < 1.499].any()  # at 1.5, a group's greatest, the last digit decides


def test_head_embeddings_and_names_stay_and_only_the_named_modules_are_rounded(whole: Any) -> None:
    model = prepared(whole, bits=2, modules=["q_proj", "mlp.down_proj"])
    assert model.state_dict().keys() == whole.state_dict().keys()
    assert all(torch.equal(weight, whole.state_dict()[name]) for name, weight in model.state_dict().items())
    after = rounded(model).state_dict()
    changed = {name for name, weight in whole.state_dict().items() if not torch.equal(weight, after[name])}
    assert changed == {
        f"model.layers.{n}.{name}.weight" for n in (0, 1) for name in ("self_attn.q_proj", "mlp.down_proj")
    }
    everywhere = rounded(prepared(whole, bits=2)).state_dict()
    assert torch.equal(everywhere["lm_head.weight"], whole.state_dict()["lm_head.weight"])
    assert torch.equal(everywhere["model.embed_tokens.weight"], whole.state_dict()["model.embed_tokens.weight"])


def test_rounded_activations_move_the_answer_a_little_and_the_folder_has_none(whole: Any) -> None:
    both, weights = prepared(whole, bits=8, activations=True), prepared(whole, bits=8)
    gap = (both(IDS).logits - weights(IDS).logits).norm() / whole(IDS).logits.norm()
    assert 0 < gap < 0.05
    assert torch.equal(rounded(both)(IDS).logits, weights(IDS).logits)


def test_an_average_of_it_is_rounded_as_it_is(whole: Any) -> None:
    model = prepared(whole, bits=3)
    model(IDS)
    average = FrozenCopy(model)
    assert torch.equal(average.module(IDS).logits, model(IDS).logits)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    average.move(0.0)
    assert torch.equal(on_the_grid(average.module)(IDS).logits, model(IDS).logits)


def test_groups_and_names_that_do_not_fit_are_refused(whole: Any) -> None:
    with pytest.raises(ValueError, match=r"group_size: 24 does not divide the 32 inputs of model\.layers\.0"):
        prepared(whole, group_size=24)
    with pytest.raises(ValueError, match="no linear layer but the head is called lm_head"):
        prepared(whole, modules=["q_proj", "lm_head"])
    with pytest.raises(ValueError, match="called roj"):
        prepared(whole, modules=["roj"])
