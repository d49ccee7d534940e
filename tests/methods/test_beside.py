"""Distances between samples and data beside any method, and MMD-DDM, which is such a distance alone."""

import pytest
import torch
from matching import FIELDS, STEP, batch, gradient, networks
from small_denoisers import denoiser
from test_distribution_matching import Watched

from kdlm.diffusion import Draws
from kdlm.methods import MMDFineTuning
from kdlm.methods.diffusion.beside import MMD, EmbeddingLoss
from kdlm.methods.diffusion.mmd_ddm import MMDFineTuningSection
from kdlm.methods.diffusion.reverse_kl import DMDSection

DISTANCES = {"mmd": MMD(), "rbf": MMD(kernel="rbf"), "features": MMD(layers=["blocks.0"]), "embedding": EmbeddingLoss()}


def draws(step: int = 0) -> Draws:
    return Draws(torch.arange(2), 0, step)


@pytest.mark.parametrize("name", DISTANCES)
def test_halves_of_one_law_are_at_distance_zero_in_the_mean_and_shifted_ones_are_not(name: str) -> None:
    distance, nets = DISTANCES[name], {"teacher": denoiser(2)}
    generator = torch.Generator().manual_seed(0)
    near, far = [], []
    for step in range(60):
        a, b = torch.randn(2, 24, 2, generator=generator)
        near.append(distance(nets, a, b, draws(step), None))
        far.append(distance(nets, a + 1.5, b, draws(step), None))
    near, far = torch.stack(near), torch.stack(far)
    assert near.mean().abs() < 3 * near.std() / 60**0.5
    assert far.mean() > 3 * near.std() / 60**0.5 and far.mean() > 0


@pytest.mark.parametrize("name", DISTANCES)
def test_the_gradient_brings_the_written_set_to_the_data(name: str) -> None:
    distance, nets = DISTANCES[name], {"teacher": denoiser(2).requires_grad_(False)}
    generator = torch.Generator().manual_seed(0)
    written = (torch.randn(64, 2, generator=generator) + 1.0).requires_grad_()
    distance(nets, written, torch.randn(64, 2, generator=generator), draws(), None).backward()
    assert (written.grad.sum(0) > 0).all()


def test_random_networks_are_the_steps_not_the_micro_batchs() -> None:
    a, b = torch.randn(2, 8, 2)
    values = [
        EmbeddingLoss()({}, a, b, Draws(index, 0, step), None)
        for index, step in ((torch.arange(8), 0), (torch.arange(8, 16), 0), (torch.arange(8), 1))
    ]
    assert torch.equal(values[0], values[1]) and not torch.equal(values[0], values[2])


def test_terms_beside_a_method_leave_its_own_alone_and_have_names_and_weights() -> None:
    beside = [MMD(weight=2.0), EmbeddingLoss(), MMD(kernel="rbf")]
    plain, more = (DMDSection(**FIELDS, beside=b).build([], None) for b in ([], beside))
    terms = [
        method.losses(networks(method, fake=denoiser(5)), batch(), frozenset({"student"}), STEP).terms
        for method in (plain, more)
    ]
    assert torch.equal(terms[0]["student"].sum, terms[1]["student"].sum)
    assert {name: term.weight for name, term in terms[1].items()} == {
        "student": 1.0, "mmd": 2.0, "embedding": 1.0, "mmd 2": 1.0,
    }  # fmt: skip
    assert set(more.computes) == {"student", "fake", "mmd", "embedding", "mmd 2"}
    assert not more.losses(networks(more), batch(), frozenset({"fake"}), STEP).terms.keys() & {"mmd", "embedding"}


def test_a_last_batch_of_one_row_adds_nothing() -> None:
    method = DMDSection(**FIELDS, beside=[MMD()]).build([], None)
    assert method.losses(networks(method), batch(1), frozenset({"student"}), STEP).terms["mmd"].sum == 0


def test_mmd_ddm_goes_back_through_all_steps_of_its_sampler() -> None:
    method = MMDFineTuningSection(times=[2.5, 1.0, 0.3]).build([], None)
    nets = {"student": Watched(denoiser(1))}
    method.losses(nets, batch(), frozenset({"student"}), STEP).terms["mmd"].sum.backward()
    assert [noise for _, noise in nets["student"].calls] == pytest.approx([2.5, 1.0, 0.3])
    assert all(live for live, _ in nets["student"].calls)
    assert nets["student"].given == [False, True, True]  # whether what it was asked about hung on the step before
    assert gradient(nets["student"]).abs().sum() > 0


def test_mmd_ddm_trains_the_sampler_that_it_samples_with() -> None:
    method, net = MMDFineTuning(times=[2.5, 1.0]), denoiser(1)
    seen = []
    method.beside = lambda nets, written, batch, step: seen.append(written) or {}
    rows = batch()
    method.losses({"student": net}, rows, frozenset({"student"}), STEP)
    again = method.sampler()(net, Draws(rows["index"], STEP.seed, STEP.index), {"labels": rows["labels"]})
    torch.testing.assert_close(seen[0], again)


def test_mmd_ddm_needs_a_teacher_for_its_features_alone() -> None:
    assert MMDFineTuning(times=[1.0]).needs == {"samples"}
    assert MMDFineTuning(times=[1.0], mmd=MMD(layers=["blocks.0"])).needs == {"samples", "teacher.denoiser"}


@pytest.mark.parametrize("bandwidths", [[], [0.0]])
def test_bandwidths_must_be_above_zero(bandwidths: list[float]) -> None:
    with pytest.raises(ValueError, match="bandwidths must be one or more numbers above 0"):
        MMD(bandwidths=bandwidths)
