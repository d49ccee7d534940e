"""Attention transfer as a method."""

import pytest
import torch
from small_images import SmallCNN, gradients, image_rows, nets_of, small_vit

from kdlm.losses import ForwardKL
from kdlm.methods import AttentionTransfer


def test_equal_networks_cost_nothing():
    method = AttentionTransfer(layers=[("fine", "fine"), ("coarse", "coarse")])
    assert gradients(method, nets_of(method, SmallCNN(), SmallCNN()), image_rows())["loss"] < 1e-20


def test_stages_add_up_and_every_one_teaches():
    rows, pairs = image_rows(), [("fine", "fine"), ("coarse", "fine")]
    found = []
    for layers in ([pairs[0]], [pairs[1]], pairs):
        method = AttentionTransfer(layers=layers)
        found.append(gradients(method, nets_of(method, SmallCNN(), SmallCNN(5, seed=1)), rows))
    torch.testing.assert_close(found[0]["loss"] + found[1]["loss"], found[2]["loss"])
    assert found[0]["student.fine.0.weight"].any() and found[1]["student.coarse.0.weight"].any()


def test_tokens_are_laid_out_as_a_map():
    method = AttentionTransfer([ForwardKL()], layers=[("vit.layers.1", "coarse")])
    found = gradients(method, nets_of(method, small_vit(), SmallCNN()), image_rows())
    assert found["loss"].isfinite() and all(g.any() for n, g in found.items() if n.startswith("student.vit.layers.1"))


def test_a_vector_is_no_map():
    method = AttentionTransfer(layers=[("embedding", "embedding")])
    with pytest.raises(ValueError, match="no map, nor tokens that make a square"):
        gradients(method, nets_of(method, SmallCNN(), SmallCNN()), image_rows())
