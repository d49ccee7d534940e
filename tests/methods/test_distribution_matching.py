"""The family of distribution matching: who gets gradients from what, who moves when, and controls that must fail."""

from typing import Any

import pytest
import torch
from matching import FIELDS, STEP, TIMES, Normal, batch, gradient, networks, reached
from small_denoisers import denoiser
from torch import nn

from kdlm.diffusion import Draws, Karras
from kdlm.methods import DistributionMatching, Step
from kdlm.methods.diffusion.adversarial import DMD2Section, FDistillSection, LADDSection
from kdlm.methods.diffusion.method import condition_of, draws_of
from kdlm.methods.diffusion.pull import Compared, NormalisedDifference
from kdlm.methods.diffusion.reverse_kl import DMDSection, NoiseDifference, PointDifference, SDSSection, VSDSection
from kdlm.methods.diffusion.score_implicit import ScoreIdentity, SiDSection, SIMSection

HEADS = {"layers": ["blocks.0"], "width": 8}
SECTIONS = {
    "sds": SDSSection(**FIELDS),
    "vsd": VSDSection(**FIELDS),
    "dmd": DMDSection(**FIELDS),
    "dmd2": DMD2Section(**FIELDS, discriminator=HEADS),
    "dmd2 on the teacher": DMD2Section(**FIELDS, discriminator={**HEADS, "of": "teacher"}),
    "f_distill": FDistillSection(**FIELDS, discriminator=HEADS),
    "sim": SIMSection(**FIELDS),
    "sid": SiDSection(**FIELDS),
    "ladd": LADDSection(**FIELDS, discriminator=HEADS),
}
everyone = pytest.mark.parametrize("name", SECTIONS)


def built(name: str) -> DistributionMatching:
    return SECTIONS[name].build([], None)


@everyone
def test_the_students_terms_move_the_student_alone(name: str) -> None:
    method = built(name)
    nets = networks(method, fake=denoiser(5))
    terms = method.losses(nets, batch(), frozenset({"student"}), STEP).terms
    sum(term.weight * term.sum for term in terms.values()).backward()
    assert reached(nets) == {"student"}
    assert all(p.requires_grad for key, net in nets.items() if key != "teacher" for p in net.parameters())


@everyone
def test_each_critics_term_moves_it_and_never_the_student(name: str) -> None:
    method = built(name)
    critics = frozenset(method.critics)
    moves = {"fake": {"fake"}, "discriminator": {"discriminator", "fake"}}
    if method.discriminator is not None and method.discriminator.of == "teacher":
        moves["discriminator"] = {"discriminator"}
    for critic in critics:
        nets = networks(method, fake=denoiser(5))
        terms = method.losses(nets, batch(), critics, STEP).terms
        assert set(terms) == critics
        terms[critic].sum.backward()
        assert reached(nets) == moves[critic]


def test_there_is_no_role_that_nothing_needs() -> None:
    assert set(built("sds").roles) == {"student"}
    assert set(built("ladd").roles) == {"student", "discriminator"}
    assert set(built("dmd").roles) == {"student", "fake"}
    assert set(built("dmd2").roles) == {"student", "fake", "discriminator"}


def turns(method: DistributionMatching, steps: int = 7) -> list[str]:
    return ["".join(sorted(role[0] for role in method.active(step))) for step in range(steps)]


def test_the_critics_take_turns_with_the_student_together() -> None:
    def method(**options: Any) -> DistributionMatching:
        return DMD2Section(**FIELDS, discriminator=HEADS, **options).build([], None)

    assert turns(method(ratio=3)) == ["dfs", "df", "df", "dfs", "df", "df", "dfs"]
    assert turns(method(ratio=3, cadence="exclusive")) == ["s", "df", "df", "s", "df", "df", "s"]
    assert turns(method(ratio=1, cadence="exclusive"), 2) == ["dfs", "dfs"]
    assert turns(built("sds"), 2) == ["s", "s"]


def test_every_term_that_is_promised_is_computed() -> None:
    for name in SECTIONS:
        method = built(name)
        terms = method.losses(networks(method), batch(), method.active(0), STEP).terms
        assert set(method.computes) <= set(terms), name


@pytest.mark.parametrize("name", ["dmd", "vsd", "sid", "sim"])
def test_a_fake_network_that_is_the_teacher_pulls_nowhere(name: str) -> None:
    """So a fake score that is frozen at its start teaches a student that starts with it nothing."""
    method = built(name)
    nets = networks(method)  # the fake network starts as a copy of the teacher
    method.losses(nets, batch(), frozenset({"student"}), STEP).terms["student"].sum.backward()
    assert gradient(nets["student"]).abs().max() < 1e-6


def test_scores_of_the_live_pulls_reach_the_student_through_both_networks() -> None:
    class Detached(ScoreIdentity):
        live = False

    grads = {}
    for kind in (ScoreIdentity, Detached):
        method = DistributionMatching(kind(), **FIELDS)
        nets = networks(method, fake=denoiser(5))
        method.losses(nets, batch(), frozenset({"student"}), STEP).terms["student"].sum.backward()
        grads[kind] = gradient(nets["student"])
    assert (grads[ScoreIdentity] - grads[Detached]).norm() > 0.1 * grads[Detached].norm()


def test_the_pull_of_dmd2_is_dmds_and_that_of_f_distill_with_reverse_kl_too() -> None:
    reverse = FDistillSection(**FIELDS, discriminator=HEADS, divergence="reverse_kl").build([], None)
    values = []
    for method in (built("dmd"), built("dmd2"), reverse):
        nets = networks(method, fake=denoiser(5))
        values.append(method.losses(nets, batch(), frozenset({"student"}), STEP).terms["student"].sum)
    assert torch.equal(values[0], values[1]) and torch.equal(values[0], values[2])


class Same(nn.Module):
    """Takes every noised sample for the sample that it was told."""

    def __init__(self, samples: torch.Tensor):
        super().__init__()
        self.samples = samples

    def forward(self, noised, level, condition=None):
        return self.samples


def test_sds_is_vsd_with_a_fake_network_that_knows_the_single_point() -> None:
    sds, vsd = built("sds"), built("vsd")
    nets = networks(sds)
    rows = batch()
    samples = sds.written(nets["student"], draws_of(rows, STEP), condition_of(rows)).detach()
    values = [
        method.losses(nets | {"fake": Same(samples)}, rows, frozenset({"student"}), STEP) for method in (sds, vsd)
    ]
    assert torch.equal(*(value.terms["student"].sum for value in values))


class Watched(nn.Module):
    """Notes of every call whether its output is in a graph, whether its input was, and at which noise."""

    def __init__(self, inner: Any):
        super().__init__()
        self.inner, self.calls, self.given = inner, [], []
        self.form, self.shape = inner.form, inner.shape

    def forward(self, noised, level, condition=None, **options):
        clean = self.inner(noised, level, condition, **options)
        self.given.append(noised.requires_grad)
        self.calls.append((clean.requires_grad, level.ratio[0].item()))
        return clean


@pytest.mark.parametrize("index", range(8))
def test_backward_simulation_keeps_the_graph_of_one_step_which_all_samples_share(index: int) -> None:
    method = DMDSection(steps=[2.5, 1.0, 0.3], times=TIMES).build([], None)
    calls = []
    for start in (0, 100):
        nets = networks(method, student=Watched(denoiser(1)), fake=denoiser(5))
        method.losses(nets, batch(start=start), frozenset({"student"}), Step(index, 10, seed=3))
        calls.append(nets["student"].calls)
    assert calls[0] == calls[1]
    *before, last = calls[0]
    assert last[0] and not any(live for live, _ in before) and not any(nets["student"].given)
    assert [noise for _, noise in calls[0]] == pytest.approx([2.5, 1.0, 0.3][: len(calls[0])])


def test_every_step_gets_its_turn() -> None:
    method = DMDSection(steps=[2.5, 1.0, 0.3], times=TIMES).build([], None)
    drawn = [int(Draws(torch.arange(2), 0, step).shared("step") * len(method.steps)) for step in range(300)]
    assert [drawn.count(k) / 300 for k in range(3)] == pytest.approx([1 / 3] * 3, abs=0.1)


class Shifted(nn.Module):
    """A student in one dimension that writes `mean + std z`."""

    def __init__(self, mean: float, std: float):
        super().__init__()
        self.mean, self.std = nn.Parameter(torch.tensor(mean)), nn.Parameter(torch.tensor(std))
        self.form, self.shape = Normal(0.0, 1.0).form, (1,)

    def forward(self, noised, level, condition=None):
        return self.mean + self.std * noised / level.scale[:, None]


class Flipped(NormalisedDifference):
    """The wrong sign."""

    def __call__(self, seen: Compared) -> torch.Tensor:
        return -super().__call__(seen)


def trained(pull: Any, *, fake_follows: bool = True, steps: int = 60) -> Shifted:
    """A student of one dimension that began at N(-1, 0.5), trained to N(1, 1), with a fake score exact or stuck."""
    method = DistributionMatching(pull, steps=[80.0], times=Karras(low=0.1, high=5.0))
    student, teacher = Shifted(-1.0, 0.5), Normal(1.0, 1.0).requires_grad_(False)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05)
    for step in range(steps):
        start = Normal(1.0, 1.0)
        fake = Normal(student.mean.detach(), student.std.detach()) if fake_follows else start
        nets = {"student": student, "teacher": teacher, "fake": fake}
        rows = {"index": torch.arange(256), "samples": torch.zeros(256, 1)}
        loss = method.losses(nets, rows, frozenset({"student"}), Step(step, steps)).terms["student"].sum / 256
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return student


@pytest.mark.parametrize("pull", [NormalisedDifference(), NoiseDifference("variance"), ScoreIdentity(1.0)])
def test_a_student_goes_to_its_teacher(pull: Any) -> None:
    student = trained(pull)
    assert student.mean > -0.6 and student.std > 0.52


def test_with_the_sign_flipped_it_goes_away() -> None:
    student = trained(Flipped())
    assert student.mean < -1.2 and student.std < 0.5


def test_with_a_fake_score_that_stays_the_teachers_it_does_not_move() -> None:
    student = trained(NormalisedDifference(), fake_follows=False)
    assert (student.mean.item(), student.std.item()) == pytest.approx((-1.0, 0.5), abs=1e-6)


def test_without_a_fake_network_samples_go_to_the_mode_and_lose_their_spread() -> None:
    student = trained(PointDifference("variance"), steps=200)
    assert student.mean > 0.5 and student.std.abs() < 0.2


def test_guidance_is_the_teachers_alone() -> None:
    asked: dict[str, list] = {"teacher": [], "fake": []}

    class Asked(Watched):
        def forward(self, noised, level, condition=None):
            asked[self.of].append(condition["labels"].tolist())
            return self.inner(noised, level, condition)

        def unconditional(self, condition):
            return self.inner.unconditional(condition)

    method = DMDSection(**FIELDS, guidance=2.0).build([], None)
    nets = {"student": denoiser(1)}
    for name, seed in (("teacher", 2), ("fake", 5)):
        nets[name] = Asked(denoiser(seed))
        nets[name].of = name
    method.losses(nets, batch(3), frozenset({"student", "fake"}), STEP)
    assert asked == {"teacher": [[0, 1, 2], [3, 3, 3]], "fake": [[0, 1, 2], [0, 1, 2]]}


def test_a_method_without_pull_and_discriminator_is_refused() -> None:
    with pytest.raises(ValueError, match="a discriminator is missing"):
        DistributionMatching(None, **FIELDS)
