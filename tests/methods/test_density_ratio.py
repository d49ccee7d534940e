"""Weights from the ratio of two laws: clamps, means in bins of noise, and state that batches do not shape."""

import pytest
import torch

from kdlm.methods.diffusion.density_ratio import DensityRatio


def told(ratio: DensityRatio, logit: torch.Tensor, place: torch.Tensor) -> dict[str, torch.Tensor]:
    """The global means of a step whose whole batch this is."""
    _, followed = ratio(logit, place)
    return {name: value / len(logit) for name, (value, _) in followed.items()}


def test_a_discriminator_that_knows_nothing_weighs_nothing() -> None:
    for name in ("forward_kl", "js", "neyman", "squared_hellinger"):
        weight, _ = DensityRatio(name)(torch.zeros(5), torch.rand(5))
        torch.testing.assert_close(weight, torch.ones(5))


def test_the_logit_is_clamped_and_after_the_division_the_ratio() -> None:
    ratio = DensityRatio("forward_kl", bins=1)
    torch.testing.assert_close(
        ratio(torch.tensor([-50.0, 50.0, 1.0]), torch.zeros(3))[0], torch.tensor([0.1, 20, 2.71828])
    )
    ratio.ratios.fill_(100.0)
    weight, followed = ratio(torch.tensor([50.0, 6.0, 0.0]), torch.zeros(3))
    torch.testing.assert_close(weight, torch.tensor([20.0, torch.tensor(6.0).exp().item() / 100, 0.1]))
    assert followed["ratio 0"][0].item() == pytest.approx(torch.tensor([10.0, 6.0, 0.0]).exp().sum().item())


def test_running_means_make_the_mean_weight_one_and_even_out_the_noise_levels() -> None:
    generator = torch.Generator().manual_seed(0)
    ratio = DensityRatio("jeffreys", bins=4, decay=0.0)
    place = torch.rand(4000, generator=generator)
    logit = torch.randn(4000, generator=generator) * 0.5 + 2 * (place > 0.5)
    for _ in range(2):  # the second step's h is that of the first one's bins
        ratio.stepped(told(ratio, logit, place))
    weight, _ = ratio(logit, place)
    assert weight.mean().item() == pytest.approx(1.0, abs=1e-5)
    assert weight[place > 0.5].mean().item() == pytest.approx(weight[place <= 0.5].mean().item(), rel=0.02)


def test_what_a_step_follows_is_the_same_however_its_batch_is_cut() -> None:
    torch.manual_seed(0)
    logit, place = torch.randn(12), torch.rand(12)
    whole = {name: value for name, (value, _) in DensityRatio()(logit, place)[1].items()}
    parts = [DensityRatio()(logit[at], place[at])[1] for at in (slice(0, 5), slice(5, 12))]
    for name, value in whole.items():
        torch.testing.assert_close(parts[0][name][0] + parts[1][name][0], value)
    assert set(DensityRatio().follows) == set(whole)


def test_a_bin_without_samples_and_a_step_without_the_student_move_nothing() -> None:
    ratio = DensityRatio(bins=2, decay=0.5)
    ratio.stepped(told(ratio, torch.full((4,), 2.0), torch.zeros(4)))
    moved = ratio.ratios.clone()
    assert moved[1] == 1 and moved[0] == pytest.approx(0.5 + 0.5 * torch.tensor(2.0).exp().item())
    ratio.stepped({name: torch.zeros(()) for name in ratio.follows})
    assert torch.equal(ratio.ratios, moved)


def test_the_state_survives_a_checkpoint() -> None:
    ratio, other = DensityRatio("js"), DensityRatio("js")
    ratio.stepped(told(ratio, torch.randn(64) + 1, torch.rand(64)))
    other.load_state_dict({name: value.clone() for name, value in ratio.state_dict().items()})
    logit, place = torch.randn(8), torch.rand(8)
    assert torch.equal(ratio(logit, place)[0], other(logit, place)[0])


def test_weights_are_in_no_graph() -> None:
    logit = torch.randn(4, requires_grad=True)
    weight, followed = DensityRatio()(logit, torch.rand(4))
    assert not weight.requires_grad and not any(value.requires_grad for value, _ in followed.values())
