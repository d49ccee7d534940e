"""The discriminator: what it reads, what it loses, and that its logit is the ratio of two laws."""

import pytest
import torch
from matching import STEP, TIMES, batch, gradient, networks
from small_denoisers import denoiser
from torch import nn

from kdlm.diffusion import Level
from kdlm.methods.diffusion.adversarial import DMD2Section, LADDSection
from kdlm.methods.diffusion.discriminator import Discriminator, Heads, places_of

FIELDS = {"steps": [2.5], "times": TIMES}


def judge(**options) -> Discriminator:
    return Discriminator(layers=["blocks.0", "blocks.1"], width=8, **options)


def nets(of: str = "teacher") -> dict:
    torch.manual_seed(0)
    network = denoiser(2)
    return {of: network, "discriminator": judge().heads(network)}


LEVEL = Level(torch.ones(4), torch.full((4,), 0.7))
X, Y = torch.randn(4, 2, generator=torch.Generator().manual_seed(1)), torch.ones(4, 2)


def test_features_of_any_shape_are_places() -> None:
    assert places_of(torch.zeros(3, 5)).shape == (3, 1, 5)
    assert places_of(torch.zeros(3, 7, 5)).shape == (3, 7, 5)
    maps = torch.arange(3 * 5 * 2 * 4.0).reshape(3, 5, 2, 4)
    assert places_of(maps).shape == (3, 8, 5)
    assert torch.equal(places_of(maps)[0, 3], maps[0, :, 0, 3])


def test_each_layer_counts_alike_however_many_places_it_has() -> None:
    heads = Heads([5, 6], hidden=4)
    logits = heads([torch.randn(3, 5), torch.randn(3, 6, 8, 8)])
    assert [k.shape for k in logits] == [(3, 1), (3, 64)]


def test_a_layer_that_is_not_there_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"no module 'blocks\.7'"):
        Discriminator(layers=["blocks.7"]).heads(denoiser(0))


@pytest.mark.parametrize("loss", ["softplus", "hinge"])
def test_losses_are_those_of_their_logits(loss: str) -> None:
    given = nets()
    single = Discriminator(layers=["blocks.0"], width=8, of="teacher", loss=loss)
    given["discriminator"] = Heads([16], 8)
    written, real = (single.logit(given, at, LEVEL, None) for at in (X, Y))
    lost, told = single.fooled(given, X, LEVEL, None), single.told_apart(given, X, Y, LEVEL, None)
    if loss == "softplus":
        torch.testing.assert_close(lost, nn.functional.softplus(-written))
        torch.testing.assert_close(told, nn.functional.softplus(written) + nn.functional.softplus(-real))
    else:
        torch.testing.assert_close(lost, -written)
        torch.testing.assert_close(told, (1 + written).relu() + (1 - real).relu())


def test_a_discriminator_that_says_the_same_of_all_has_no_steepness() -> None:
    one, given = judge(of="teacher"), nets()
    assert one.steepness(given, X, Y, LEVEL, None).sum() > 0
    for head in given["discriminator"].heads:
        nn.init.zeros_(head[-1].weight)
    assert torch.equal(one.steepness(given, X, Y, LEVEL, None), torch.zeros(4))


def test_r1_is_a_term_beside_the_discriminators_own() -> None:
    heads = {"layers": ["blocks.0"], "own_weight": 0.5}
    for r1, names in ((0.0, {"discriminator"}), (100.0, {"discriminator", "r1"})):
        method = LADDSection(**FIELDS, discriminator={**heads, "r1": r1}).build([], None)
        terms = method.losses(networks(method), batch(), frozenset({"discriminator"}), STEP).terms
        assert set(terms) == names
    assert terms["r1"].weight == 50.0


def test_the_student_and_the_discriminator_want_opposite_things() -> None:
    """A step of the student down its own term raises the logits of its noised samples."""
    method = LADDSection(**FIELDS, discriminator={"layers": ["blocks.0"]}).build([], None)
    made = networks(method)
    student = made["student"]

    def lost() -> torch.Tensor:
        return method.losses(made, batch(32), frozenset({"student"}), STEP).terms["adversarial"].sum

    before = lost()
    before.backward()
    with torch.no_grad():
        for p in student.parameters():
            p -= 1e-3 * p.grad / gradient(student).norm()
    assert lost() < before


def test_its_levels_may_be_its_own() -> None:
    def value(**options) -> torch.Tensor:
        method = DMD2Section(**FIELDS, discriminator={"layers": ["blocks.0"], **options}).build([], None)
        return method.losses(networks(method), batch(), frozenset({"student"}), STEP).terms["adversarial"].sum

    assert torch.equal(value(), value(times=TIMES))
    assert not torch.equal(value(), value(times={"name": "log_normal"}))


def test_the_logit_of_a_trained_discriminator_is_the_log_ratio_of_the_laws() -> None:
    """Of data at N(0.5, 1) and samples at N(-0.5, 1) in each of two axes, unnoised: log p / q = x + y."""
    torch.manual_seed(0)
    one, network = Discriminator(layers=["enter"], of="teacher", width=32), denoiser(3, width=32)
    given = {"teacher": network.requires_grad_(False), "discriminator": one.heads(network)}
    optimizer = torch.optim.Adam(given["discriminator"].parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    level = Level(torch.ones(256), torch.full((256,), 0.01))
    for _ in range(250):
        noise = torch.randn(2, 256, 2, generator=generator)
        loss = one.told_apart(given, noise[0] - 0.5, noise[1] + 0.5, level, None).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    points = 0.7 * torch.randn(256, 2, generator=generator)
    logit = one.logit(given, points, level, None)
    assert torch.corrcoef(torch.stack([logit, points.sum(1)]))[0, 1] > 0.95
    assert (logit - points.sum(1)).abs().mean() < 0.35
