"""OFA-KD as a method: branches on stages of any kind."""

from pathlib import Path

import torch
from small_images import CLASSES, SmallCNN, gradients, image_rows, nets_of, resumed_equals_whole, small_vit

from kdlm.losses import OFA, CrossEntropy
from kdlm.methods import OFAKD


def test_with_eps_one_a_stage_learns_by_cross_entropy_to_the_teacher():
    method = OFAKD(stages=["coarse"])
    student, teacher = SmallCNN(), SmallCNN(5, seed=1)
    nets, rows = nets_of(method, student, teacher), image_rows()
    images = rows.columns["pixel_values"]
    logits = nets["branches"][0](student.coarse(student.fine(images)))
    assert logits.shape == (8, CLASSES)
    expected = -(teacher(images).softmax(-1) * logits.log_softmax(-1)).sum()
    torch.testing.assert_close(gradients(method, nets, rows)["loss"], expected.detach())


def test_maps_tokens_and_vectors_have_branches_that_learn():
    rows = image_rows()
    for student, teacher, stages in (
        (SmallCNN(), small_vit(), ["fine", "coarse", "embedding"]),
        (small_vit(), SmallCNN(), ["vit.layers.0", "vit.layers.1"]),
    ):
        method = OFAKD([CrossEntropy(), OFA(eps=1.0)], stages=stages, eps=1.5)
        found = gradients(method, nets_of(method, student, teacher), rows)
        assert found["loss"].isfinite()
        assert all(gradient.any() for name, gradient in found.items() if name.startswith("branches"))


def test_how_a_batch_is_cut_is_inert():
    method = OFAKD(stages=["fine", "coarse"], eps=1.5)
    nets, rows = nets_of(method, SmallCNN(), SmallCNN(5, seed=1)), image_rows()
    whole = gradients(method, nets, rows)
    pieces = [gradients(method, nets, rows.select(part)) for part in (range(3), range(3, 8))]
    for name, gradient in whole.items():
        torch.testing.assert_close(pieces[0][name] + pieces[1][name], gradient)


def test_a_run_resumes_exactly_with_its_branches(tmp_path: Path):
    resumed_equals_whole(lambda: OFAKD([CrossEntropy()], stages=["fine", "coarse"]), tmp_path)
