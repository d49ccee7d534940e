"""FitNet: equality, maps of other sizes, tokens, wrong paths, and what is saved with whom."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from small_images import STEP, SmallCNN, gradients, image_rows, nets_of, resumed_equals_whole, small_vit, trainer_of
from torch import nn

from kdlm.losses import ForwardKL
from kdlm.methods import FitNet


def identity(nets):
    for projector in nets["projectors"]:
        nn.init.eye_(projector.weight)
        nn.init.zeros_(projector.bias)


def test_equal_features_through_an_identity_cost_nothing():
    method = FitNet(layers=[("coarse", "coarse"), ("embedding", "embedding")])
    nets = nets_of(method, SmallCNN(), SmallCNN())
    identity(nets)
    assert gradients(method, nets, image_rows())["loss"] < 1e-20


def test_the_projector_learns_and_nothing_above_the_features_does():
    method = FitNet(layers=[("coarse", "coarse")])
    nets = nets_of(method, SmallCNN(3), SmallCNN(5, seed=1))
    found = gradients(method, nets, image_rows())
    assert nets["projectors"][0].weight.shape == (10, 6)
    assert found["projectors.0.weight"].abs().sum() > 0 and found["student.fine.0.weight"].abs().sum() > 0
    assert not any(name.startswith(("student.classes", "student.embedding")) for name in found)
    assert method.leaves_unused and not FitNet([ForwardKL()], layers=[("fine", "fine")]).leaves_unused


def test_a_map_meets_a_map_of_another_size_and_tokens():
    rows = image_rows()
    for student, teacher, layers in (
        (SmallCNN(), SmallCNN(5), [("fine", "coarse"), ("coarse", "fine")]),
        (SmallCNN(), small_vit(), [("coarse", "vit.layers.1"), ("embedding", "vit.layernorm")]),
        (small_vit(), SmallCNN(), [("vit.layers.0", "fine")]),
        (small_vit(6), small_vit(8), [("vit.layers.0", "vit.layers.1")]),
        (small_vit(6, patch=4), small_vit(8), [("vit.layers.0", "vit.layers.1")]),
    ):
        method = FitNet(layers=layers)
        found = gradients(method, nets_of(method, student, teacher), rows)
        assert found["loss"].isfinite() and all(found[f"projectors.{i}.weight"].any() for i in range(len(layers)))


def test_the_order_of_the_images_is_inert_and_sums_add_up_over_pieces():
    method = FitNet([ForwardKL()], layers=[("coarse", "coarse")])
    nets, rows = nets_of(method, SmallCNN(), SmallCNN(5, seed=1)), image_rows()
    whole = gradients(method, nets, rows)
    turned = gradients(method, nets, rows.select(range(7, -1, -1)))
    pieces = [gradients(method, nets, rows.select(part)) for part in (range(3), range(3, 8))]
    for name, gradient in whole.items():
        torch.testing.assert_close(turned[name], gradient)
        torch.testing.assert_close(pieces[0][name] + pieces[1][name], gradient)


def test_a_path_that_is_no_module_is_an_error_with_the_nearest():
    with pytest.raises(ValueError, match=r"SmallCNN has no module 'coarser'; the nearest are .*coarse"):
        nets_of(FitNet(layers=[("coarser", "coarse")]), SmallCNN(), SmallCNN())
    with pytest.raises(ValueError, match=r"has no module 'vit.layer.0'; the nearest are .*vit.layers.0"):
        nets_of(FitNet(layers=[("fine", "vit.layer.0")]), SmallCNN(), small_vit())


def test_a_net_that_does_not_say_the_shape_of_its_images_is_told_to():
    class Silent(SmallCNN):
        image_shape = None

    with pytest.raises(ValueError, match="Silent: give it an attribute `image_shape`"):
        nets_of(FitNet(layers=[("fine", "fine")]), Silent(), SmallCNN())


def test_the_teacher_gets_no_gradient():
    method = FitNet(layers=[("coarse", "coarse")])
    teacher = SmallCNN(5, seed=1)
    nets = nets_of(method, SmallCNN(), teacher)
    teacher.requires_grad_(True)
    method.losses(nets, image_rows().columns, frozenset(), STEP).terms["features"].sum.backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_projectors_train_and_are_checkpointed_but_not_exported(tmp_path: Path):
    trainer = trainer_of(FitNet([ForwardKL()], layers=[("coarse", "coarse")]), tmp_path, save_strategy="steps")
    before = trainer.networks.role["projectors"][0].weight.clone()
    trainer.train()
    assert not torch.equal(before, trainer.networks.role["projectors"][0].weight)
    trainer.save_model(str(tmp_path / "out"))
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as exported:
        assert not any("projector" in key for key in exported.keys())
    assert trainer.evaluate()["eval_features"] > 0
    resumed_equals_whole(lambda: FitNet([ForwardKL()], layers=[("coarse", "coarse")]), tmp_path)


def test_a_transformer_student_resumes_exactly(tmp_path: Path):
    """Its checkpoint has the names that it has now, not those of older releases of transformers."""
    resumed_equals_whole(
        lambda: FitNet([ForwardKL()], layers=[("vit.layers.0", "coarse")]), tmp_path, student=small_vit
    )
