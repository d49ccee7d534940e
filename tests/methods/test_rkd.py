"""Relational KD as a method: what is inert, and two ranks against one process."""

from pathlib import Path

import pytest
import torch
from forks import on_ranks
from safetensors.torch import load_file
from small_images import STEP, SmallCNN, gradients, image_rows, nets_of
from torch import nn
from two_ranks_images import METHODS, batch_gradients

from kdlm.methods import RKD, RKDSection


def turned(net: SmallCNN) -> SmallCNN:
    """Return the net with its embedding turned, tripled and moved."""
    torch.manual_seed(5)
    width = net.embedding.out_features
    turn = torch.linalg.qr(torch.randn(width, width, dtype=torch.float64))[0]
    with torch.no_grad():
        net.embedding.weight.copy_(3 * turn @ net.embedding.weight)
        net.embedding.bias.copy_(3 * turn @ net.embedding.bias + 1)
    return net


def test_embeddings_turned_scaled_and_moved_cost_nothing():
    method = RKD(layer=("embedding", "embedding"))
    found = gradients(method, nets_of(method, turned(SmallCNN()), SmallCNN()), image_rows())
    assert found["loss"] < 1e-20 and found["student.fine.0.weight"].abs().max() < 1e-8


def test_the_order_of_the_images_is_inert():
    method = RKD(layer=("embedding", "coarse"))
    nets, rows = nets_of(method, SmallCNN(), SmallCNN(5, seed=1)), image_rows()
    whole, other = (gradients(method, nets, rows.select(order)) for order in (range(8), range(7, -1, -1)))
    assert whole["student.fine.0.weight"].any()
    for name, gradient in whole.items():
        torch.testing.assert_close(other[name], gradient)


def test_a_weight_of_zero_leaves_its_term_out():
    section = RKDSection(layer=("embedding", "embedding"), angle_weight=0)
    method = section.build([], None)
    assert method.computes == ("distance",)
    terms = method.losses(nets_of(method, SmallCNN(), SmallCNN()), image_rows().columns, frozenset(), STEP)
    assert set(terms.terms) == {"distance"}


def test_nothing_is_learned_beside_the_student():
    assert set(RKD(layer=("embedding", "embedding")).roles) == {"student"}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> Path:
    """What two gloo ranks of four images each computed, of every method that compares images."""
    folder = tmp_path_factory.mktemp("ranks")
    on_ranks(2, Path(__file__).with_name("two_ranks_images.py"), folder)
    return folder


@pytest.mark.parametrize("name", METHODS)
def test_two_ranks_have_the_gradient_of_one_process(ranks: Path, name: str):
    gradient, state = batch_gradients(name, slice(0, 8))
    here = gradient | state
    there = load_file(ranks / f"{name}.safetensors")
    assert set(here) == set(there) and any(gradient.any() for gradient in here.values())
    for key, gradient in here.items():
        torch.testing.assert_close(there[key], gradient)


def test_in_evaluation_each_rank_compares_its_own_rows(monkeypatch):
    """Ranks go through different numbers of batches there: nothing may wait for another rank."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: pytest.fail("asked for the other ranks"))
    method = RKD(layer=("embedding", "embedding"))
    with torch.no_grad():
        nets = nets_of(method, SmallCNN(), SmallCNN(5, seed=1))
        assert method.losses(nets, image_rows().columns, frozenset(), STEP).terms["distance"].sum > 0
    assert isinstance(nets["student"].module, nn.Module)
