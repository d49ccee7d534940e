"""DMAE: what the teacher sees, how far it runs, and what costs nothing."""

from pathlib import Path

import pytest
import torch
from small_images import STEP, arguments, resumed
from torch import nn
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from kdlm import DistillTrainer
from kdlm.data import TensorRows
from kdlm.methods import DMAE, DMAESection
from kdlm.models import MaskedAutoencoder, view
from kdlm.networks import Networks


def small_mae(width: int = 8, layers: int = 3, seed: int = 0, **options) -> ViTMAEForPreTraining:
    torch.manual_seed(seed)
    config = ViTMAEConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=16, image_size=8,
        patch_size=2, num_channels=1, decoder_hidden_size=8, decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2, decoder_intermediate_size=16, **{"mask_ratio": 0.75} | options,
    )  # fmt: skip
    return ViTMAEForPreTraining(config)


def images(count: int = 6, dtype=torch.float64) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(count, 1, 8, 8, generator=generator, dtype=torch.float64).to(dtype)
    return {"pixel_values": pixels, "index": torch.arange(count)}


def nets_of(method: DMAE, student=None, teacher=None):
    teacher = (teacher or small_mae(12, 5, seed=1)).double().eval().requires_grad_(False)
    return Networks((student or small_mae()).double(), method, view(teacher)).double().views


def test_equal_networks_with_an_identity_in_place_of_the_projector_have_no_distance():
    method = DMAE()
    both = {**nets_of(method, small_mae(), small_mae()), "projector": nn.Identity()}
    terms = method.losses(both, images(), frozenset(), STEP).terms
    assert terms["features"].sum == 0 and terms["pixels"].sum > 0


def test_the_teacher_gets_the_seen_tokens_alone_and_stops_at_its_block():
    method, teacher, ran = DMAE(), small_mae(12, 5, seed=1), []
    for number, layer in enumerate(teacher.vit.layers):
        layer.register_forward_pre_hook(lambda module, args, number=number: ran.append((number, args[0].shape[1])))
    teacher.decoder.register_forward_pre_hook(lambda *args: pytest.fail("the teacher's decoder ran"))
    method.losses(nets_of(method, small_mae(), teacher), images(), frozenset(), STEP)
    assert method.blocks == (1, 3)
    assert ran == [(0, 5), (1, 5), (2, 5), (3, 5)], "four of sixteen patches and the class, up to block 3"


def test_both_see_the_same_patches():
    both, noise = nets_of(DMAE(), small_mae(), small_mae()), torch.rand(6, 16)
    student, teacher = both["student"], both["teacher"]
    _, ours = student.reconstructed(images()["pixel_values"], noise, 1)
    torch.testing.assert_close(teacher.encoded(images()["pixel_values"], noise, 1), ours)
    other = teacher.encoded(images()["pixel_values"], 1 - noise, 1)
    assert (other - ours).abs().max() > 0.01


def test_the_pixel_error_is_the_models_own_loss():
    for norm in (False, True):
        model, noise = small_mae(norm_pix_loss=norm).double(), torch.rand(6, 16)
        errors, _ = MaskedAutoencoder(model).reconstructed(images()["pixel_values"], noise, 0)
        torch.testing.assert_close(errors.mean(), model(images()["pixel_values"], noise=noise).loss.float())


def test_how_a_batch_is_cut_and_its_order_are_inert():
    method = DMAE()
    both, batch = nets_of(method), images()

    def sums(rows):
        terms = method.losses(both, {k: v[rows] for k, v in batch.items()}, frozenset(), STEP).terms
        return torch.stack([terms["pixels"].sum, terms["features"].sum])

    torch.testing.assert_close(sums([0, 1]) + sums([5, 3, 2, 4]), sums(list(range(6))))


def test_projector_and_student_learn_and_the_teacher_does_not():
    method = DMAE()
    both = nets_of(method)
    method.losses(both, images(), frozenset(), STEP).terms["features"].sum.backward()
    assert both["projector"][0].weight.grad.any() and both["student"].module.vit.layers[1].mlp.fc1.weight.grad.any()
    assert both["student"].module.vit.layers[2].mlp.fc1.weight.grad is None, "above the aligned block"


def test_a_weight_of_zero_is_plain_masked_autoencoding():
    method = DMAESection(weight=0).build([], None)
    assert method.needs == {"images"} and set(method.roles) == {"student"}
    alone = {"student": view(small_mae().double())}
    assert set(method.losses(alone, images(), frozenset(), STEP).terms) == {"pixels"}


def test_networks_that_do_not_fit_are_errors():
    with pytest.raises(ValueError, match=r"teacher: its mask_ratio is 0.5, the student's 0.75"):
        nets_of(DMAE(), small_mae(), small_mae(mask_ratio=0.5))
    with pytest.raises(ValueError, match=r"method.blocks: \[2, 9\] is out of range: the student has 3 blocks"):
        nets_of(DMAE(blocks=(2, 9)))


def test_a_run_resumes_exactly_and_exports_no_projector(tmp_path: Path):
    rows = TensorRows(images(16, torch.float32))

    def trainer(folder: Path, **options) -> DistillTrainer:
        args = arguments(folder, **options)
        torch.manual_seed(5)
        return DistillTrainer(
            small_mae(), small_mae(12, 5, seed=1), args, method=DMAE(), train_dataset=rows, eval_dataset=rows
        )

    whole, second = resumed(trainer, tmp_path)
    assert whole.evaluate()["eval_features"] == whole.evaluate()["eval_features"], "the same patches are hidden"
    second.save_model(str(tmp_path / "out"))
    assert set(ViTMAEForPreTraining.from_pretrained(tmp_path / "out").state_dict()) == set(second.student.state_dict())
