"""Guidance as an input: a denoiser that is given one starts as it was, and one without refuses a scale."""

import pytest
import torch

from kdlm.diffusion import Level, MixtureDenoiser, ResidualDenoiser, load_denoiser
from kdlm.models.denoisers import DenoiserStudent


def trained() -> ResidualDenoiser:
    torch.manual_seed(0)
    denoiser = ResidualDenoiser((3,), width=8, depth=1, num_classes=2)
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.normal_(std=0.3)
    return denoiser


NOISED, LEVEL = (
    torch.randn(4, 3, generator=torch.Generator().manual_seed(1)),
    Level(torch.ones(4), torch.arange(1.0, 5)),
)
LABELS, SCALE = {"labels": torch.tensor([0, 1, 1, 0])}, torch.tensor([0.0, 0.5, 2.0, 14.0])


def test_a_student_that_is_given_guidance_starts_equal_to_its_weights_at_every_scale(tmp_path):
    before = trained()
    before.save_pretrained(tmp_path)
    after = DenoiserStudent(path=str(tmp_path), guided=True).load()
    expected = before(NOISED, LEVEL, LABELS)
    assert after.takes_guidance and not before.takes_guidance
    for scale in (None, SCALE):
        assert torch.equal(after(NOISED, LEVEL, LABELS, guidance=scale), expected)
    after(NOISED, LEVEL, LABELS, guidance=SCALE).sum().backward()
    gradient = after.get_parameter("guidance.weight").grad
    assert gradient is not None and gradient.any()


def test_a_guided_student_keeps_its_scale_when_it_is_opened_again(tmp_path):
    guided = trained().with_guidance()
    torch.nn.init.ones_(guided.get_parameter("guidance.weight"))
    guided.save_pretrained(tmp_path)
    for again in (load_denoiser(tmp_path), DenoiserStudent(path=str(tmp_path), guided=True).load()):
        assert torch.equal(again(NOISED, LEVEL, LABELS, guidance=SCALE), guided(NOISED, LEVEL, LABELS, guidance=SCALE))


def test_a_network_that_takes_no_scale_says_so():
    with pytest.raises(ValueError, match="takes no guidance scale"):
        trained()(NOISED, LEVEL, LABELS, guidance=SCALE)
    with pytest.raises(ValueError, match="cannot be given a guidance scale"):
        MixtureDenoiser(torch.zeros(1, 3), 1.0, torch.ones(1)).with_guidance()
