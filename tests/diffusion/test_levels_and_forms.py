"""Levels, forms and predictions: one point of a path, said in several ways."""

import itertools

import pytest
import torch
from torch import Tensor

from kdlm.diffusion import (
    Denoiser,
    FlowMatching,
    Level,
    MixtureDenoiser,
    TrigFlow,
    VarianceExploding,
    VariancePreserving,
    moved,
    over,
)
from kdlm.diffusion.denoiser import Prediction, clean_of

FORMS = {
    "exploding": VarianceExploding(),
    "preserving": VariancePreserving(torch.linspace(0.9999**0.5, 0.0047**0.5, 1000).double().square()),
    "flow": FlowMatching(),
    "trig": TrigFlow(0.5),
}
PREDICTIONS: list[Prediction] = ["epsilon", "v_prediction", "sample", "flow"]
RATIOS = torch.tensor([0.02, 0.3, 1.0, 4.0, 14.0], dtype=torch.float64)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def exploding(ratio: Tensor) -> Level:
    return Level(torch.ones_like(ratio), ratio)


@pytest.mark.parametrize("name", FORMS)
def test_a_form_finds_the_time_of_its_own_levels(name):
    form = FORMS[name]
    times = form.first + torch.linspace(0.001, 0.999, 50, dtype=torch.float64) * (form.last - form.first)
    torch.testing.assert_close(form.time(form.level(times)), times, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("one", "other"), [*itertools.permutations(FORMS, 2)])
def test_a_form_finds_the_level_on_the_same_ray_of_any_other(one, other):
    own = FORMS[one].level(FORMS[one].time(exploding(RATIOS)))
    again = FORMS[other].level(FORMS[other].time(own))
    torch.testing.assert_close(again.ratio, RATIOS, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(again.angle, RATIOS.atan(), rtol=1e-9, atol=1e-9)


def test_pure_noise_has_an_angle_on_every_path_that_reaches_it():
    for form in (FlowMatching(), TrigFlow(0.5)):
        level = form.level(torch.tensor([form.last]))
        assert level.angle.item() == pytest.approx(torch.pi / 2) and level.scale.isfinite().all()
        assert form.time(level).item() == pytest.approx(form.last)


class Exact(Denoiser):
    """The denoiser of two Gaussians, as a network of any form and prediction."""

    def __init__(self, form, prediction: Prediction):
        super().__init__()
        self.form, self.prediction, self.shape = form, prediction, (3,)
        centres = torch.tensor([[1.0, 0.0, 0.5], [-1.0, 0.5, 0.0]]).double()
        self.exact = MixtureDenoiser(centres, 0.4, torch.tensor([0.7, 0.3]).double())

    def predict(self, noised, time, condition, guidance):
        level = self.form.level(time)
        clean = self.exact(noised, level)
        noise, alpha, sigma = level.noise_in(noised, clean), over(level.alpha, noised), over(level.sigma, noised)
        outputs = {"epsilon": noise, "v_prediction": alpha * noise - sigma * clean, "sample": clean}
        return outputs.get(self.prediction, noise - clean)


@pytest.mark.parametrize("asked", FORMS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("own", FORMS)
def test_a_denoiser_of_one_form_asked_at_levels_of_another_gives_the_same_prediction(own, prediction, asked):
    denoiser, expected = Exact(FORMS[own], prediction), Exact(VarianceExploding(), "sample")
    clean, noise = normal(5, 3), normal(5, 3, seed=1)
    level = FORMS[asked].level(FORMS[asked].time(exploding(RATIOS)))
    found = denoiser(level.noised(clean, noise), level)
    truth = expected(exploding(RATIOS).noised(clean, noise), exploding(RATIOS))
    torch.testing.assert_close(found, truth, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_every_prediction_gives_back_the_sample_it_was_made_of(prediction):
    clean, noise = normal(5, 3), normal(5, 3, seed=1)
    for form in FORMS.values():
        level = form.level(form.time(exploding(RATIOS)))
        alpha, sigma = over(level.alpha, clean), over(level.sigma, clean)
        outputs = {"epsilon": noise, "v_prediction": alpha * noise - sigma * clean, "sample": clean}
        noised, output = level.noised(clean, noise), outputs.get(prediction, noise - clean)
        torch.testing.assert_close(clean_of(output, noised, level, prediction), clean, rtol=1e-9, atol=1e-9)


def test_noising_is_undone_by_either_of_the_two():
    clean, noise, level = normal(5, 3), normal(5, 3, seed=1), TrigFlow(0.5).level(torch.linspace(0.1, 1.5, 5).double())
    noised = level.noised(clean, noise)
    torch.testing.assert_close(level.noise_in(noised, clean), noise)
    torch.testing.assert_close(level.clean_in(noised, noise), clean)
    to = exploding(RATIOS)
    torch.testing.assert_close(moved(noised, clean, level, to), to.noised(clean, noise))


def test_levels_are_cut_as_batches_are():
    level = exploding(RATIOS)[2:4]
    assert level.ratio.tolist() == [1.0, 4.0] and len(level.alpha) == 2


def test_a_table_that_does_not_fall_is_refused():
    with pytest.raises(ValueError, match="must fall"):
        VariancePreserving(torch.tensor([0.9, 0.95, 0.1]))
