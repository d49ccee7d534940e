"""Discrete consistency: the closed form of Gaussian data, what is compared with what, guidance, schedules."""

import itertools

import gaussian
import pytest
import torch
from torch import nn

from kdlm.diffusion import Level, ResidualDenoiser, VarianceExploding, VariancePreserving
from kdlm.methods import Consistency, EmaOf, LatentConsistency, Step
from kdlm.methods.diffusion.level_pairs import KarrasGrid, ShrinkingGap, TimeGrid

STEP = Step(3, 10, seed=1)


def loss(method, nets, batch) -> torch.Tensor:
    return method.losses(nets, batch, frozenset({"student"}), STEP).terms["consistency"].sum


def squared(**options) -> Consistency:
    return Consistency(steps=[8.0], huber=None, weight="uniform", **options)


@pytest.mark.parametrize(("solver", "order"), [("euler", 2), ("heun", 3)])
def test_the_closed_form_of_gaussian_data_is_wrong_by_the_solvers_step_alone(solver, order):
    nets, errors = {"student": gaussian.ConsistencyMap(), "teacher": gaussian.teacher()}, []
    for steps in (20, 40, 80):
        method = squared(solver=solver, pairs=KarrasGrid(steps=steps + 1, low=0.1, high=4.0))
        errors.append(loss(method, nets, gaussian.batch(512)).sqrt().item())
    for coarse, fine in itertools.pairwise(errors):
        assert coarse / fine == pytest.approx(2**order, rel=0.2)


def digits_like(**options) -> ResidualDenoiser:
    torch.manual_seed(0)
    net = ResidualDenoiser((6,), width=16, depth=1, num_classes=3, **options)
    nn.init.normal_(net.leave.weight, std=0.5)
    if net.guidance is not None:
        nn.init.normal_(net.guidance.weight)
    return net


def rows(count: int = 8) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(3, (count,), generator=generator)
    return {"samples": torch.randn(count, 6, generator=generator), "labels": labels, "index": torch.arange(count)}


PAIRS = KarrasGrid(steps=8, low=0.1, high=4.0)


def test_only_the_students_own_prediction_at_the_noisier_level_has_a_gradient():
    student, target, teacher = digits_like(), digits_like(), digits_like().requires_grad_(False)
    seen = []

    class Watched(nn.Module):
        form, training = student.form, False

        def forward(self, noised, level, condition, guidance=None):
            seen.append((torch.is_grad_enabled(), level.ratio))
            return student(noised, level, condition, guidance=guidance)

    method = squared(pairs=PAIRS)
    loss(method, {"student": Watched(), "teacher": teacher}, rows()).backward()
    (wanted, nearer), (found, noisier) = seen
    assert (wanted, found) == (False, True) and bool((nearer < noisier).all())
    assert all(parameter.grad is None for parameter in teacher.parameters())
    averaged = squared(pairs=PAIRS, target=0.9)
    assert averaged.roles["target"] == EmaOf("student", 0.9)
    loss(averaged, {"student": student, "target": target, "teacher": teacher}, rows()).backward()
    assert all(parameter.grad is None for parameter in target.parameters())


def test_the_target_is_the_averages_where_there_is_one():
    nets = {"student": gaussian.ConsistencyMap(), "target": gaussian.ConsistencyMap(), "teacher": gaussian.teacher()}
    nn.init.constant_(nets["target"].offset, 2.0)
    pairs = KarrasGrid(steps=400, low=0.1, high=4.0)
    with torch.no_grad():
        of_average, of_itself = (
            loss(squared(pairs=pairs, target=t), nets, gaussian.batch(64)) / 64 for t in (0.9, None)
        )
    assert of_average == pytest.approx(4.0, rel=1e-2) and of_itself == pytest.approx(0.0, abs=1e-6)


class Dropping(ResidualDenoiser):
    def predict(self, noised, time, condition, guidance):
        return nn.functional.dropout(noised, 0.5, self.training) + 0 * self.enter(noised).sum()


@pytest.mark.parametrize("target", [None, 0.9])
def test_both_evaluations_drop_the_same_units(target):
    close = KarrasGrid(steps=2, low=1.0, high=1.0001)
    nets = {"student": Dropping((6,)).train(), "target": Dropping((6,)).eval()}
    method = squared(pairs=close, solver="none", target=target)
    first = loss(method, nets, rows())
    assert first < 1e-4 and loss(squared(pairs=close, solver="none"), {"student": Dropping((6,))}, rows()) < 1e-4
    nets["student"].eval()
    assert loss(method, nets, rows()) < 1e-4 and not nets["target"].training


def test_training_without_a_teacher_compares_one_sample_under_one_noise():
    method = squared(pairs=PAIRS, solver="none")
    assert method.needs == frozenset({"samples"}) and "teacher.denoiser" in squared(pairs=PAIRS).needs
    seen = []

    class Watched(nn.Module):
        form, training = VarianceExploding(), False

        def forward(self, noised, level, condition, guidance=None):
            seen.append((noised, level))
            return noised

    batch = rows()
    loss(method, {"student": Watched()}, batch)
    noises = [level.noise_in(noised, batch["samples"]) for noised, level in seen]
    torch.testing.assert_close(noises[0], noises[1], rtol=1e-4, atol=1e-4)


def test_micro_batches_do_not_change_the_sum():
    nets, batch = {"student": digits_like(), "teacher": digits_like().requires_grad_(False)}, rows()
    method = Consistency(steps=[8.0], pairs=PAIRS)
    parts = [{key: value[part] for key, value in batch.items()} for part in (slice(0, 3), slice(3, 8))]
    torch.testing.assert_close(sum(loss(method, nets, part) for part in parts), loss(method, nets, batch))


def test_the_pseudo_huber_distance_is_of_whole_samples_and_the_weight_is_one_over_the_gap():
    error = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    method = Consistency(steps=[8.0], pairs=PAIRS, huber=0.1)
    torch.testing.assert_close(method.distance(error), torch.tensor([(12.5 + 0.01) ** 0.5 - 0.1, 0.0]))
    nets = {"student": digits_like(), "teacher": digits_like().requires_grad_(False)}
    two = KarrasGrid(steps=2, low=0.5, high=2.5)  # a gap of 2
    weighed = loss(Consistency(steps=[8.0], pairs=two), nets, rows())
    plain = loss(Consistency(steps=[8.0], pairs=two, weight="uniform"), nets, rows())
    torch.testing.assert_close(weighed, plain / 2)


def test_the_teachers_step_is_guided():
    teacher, batch = digits_like(), rows()
    at, to = (Level(torch.ones(8), torch.full((8,), ratio)) for ratio in (2.0, 1.0))
    condition = {"labels": batch["labels"]}
    found = squared(pairs=PAIRS, solver="euler").teachers_step(teacher, batch["samples"], at, to, condition, 1.5)
    with_label = teacher(batch["samples"], at, condition)
    without = teacher(batch["samples"], at, {"labels": torch.full((8,), 3)})
    clean = with_label + 1.5 * (with_label - without)
    torch.testing.assert_close(found, clean + (batch["samples"] - clean) / 2)


def latent(**options) -> LatentConsistency:
    chosen = {"guidance": (0.0, 2.0), "sampled_guidance": 1.0, "steps": [8.0], "pairs": PAIRS, "solver": "euler"}
    return LatentConsistency(**chosen | options)


def test_both_evaluations_of_a_latent_model_are_told_the_scale_that_guides_the_teacher():
    told, student = [], digits_like(guided=True)

    class Watched(nn.Module):
        form, training = student.form, False

        def forward(self, noised, level, condition, guidance=None):
            told.append(guidance)
            return student(noised, level, condition, guidance=guidance)

    loss(latent(), {"student": Watched(), "teacher": digits_like()}, rows())
    assert torch.equal(told[0], told[1]) and 0 < told[0].min() < 1 < told[0].max() < 2
    told.clear()
    loss(latent(guidance=(1.0, 1.0)), {"student": Watched(), "teacher": digits_like()}, rows())
    assert told == [None, None]


def test_a_latent_student_that_takes_no_scale_and_a_scale_it_does_not_learn_are_errors():
    with pytest.raises(ValueError, match="takes no guidance scale"):
        loss(latent(), {"student": digits_like(), "teacher": digits_like()}, rows())
    with pytest.raises(ValueError, match="sampled_guidance: 3 is not in the range 0 to 2"):
        latent(sampled_guidance=3.0)


def test_a_latent_model_samples_at_its_scale():
    from kdlm.diffusion import Draws

    student, draws = digits_like(guided=True), Draws(torch.arange(4), 0, 0)
    at = {scale: latent(sampled_guidance=scale).sampler()(student, draws, None) for scale in (0.5, 1.5)}
    noise = draws.normal("written 0", (6,)) * 65**0.5
    level = Level(torch.ones(4), torch.full((4,), 8.0))
    torch.testing.assert_close(at[0.5], student(noise, level, None, guidance=torch.full((4,), 0.5)))
    assert not torch.allclose(at[0.5], at[1.5])


UNIFORM = torch.linspace(0.001, 0.999, 1001)


def test_a_grids_pairs_are_neighbours_each_as_likely():
    at, to = KarrasGrid(steps=5, low=0.1, high=10.0).draw(UNIFORM, VarianceExploding(), 0.0)
    levels, counts = at.ratio.unique(return_counts=True)
    assert len(levels) == 4 and counts.min() >= 250 and at.ratio.max() == pytest.approx(10.0)
    assert to.ratio.min() == pytest.approx(0.1) and bool((to.ratio < at.ratio).all())
    assert set(at.ratio.unique().tolist()) - set(to.ratio.unique().tolist()) == {at.ratio.max().item()}


def test_fifty_steps_of_a_table_of_a_thousand_skip_twenty():
    table = VariancePreserving(torch.linspace(0.999, 0.005, 1001).double())
    at, to = TimeGrid(steps=50).draw(UNIFORM, table, 0.0)
    torch.testing.assert_close(table.time(at) - table.time(to), torch.full_like(UNIFORM, 20.0), rtol=0, atol=0.1)
    assert table.time(at).max() == pytest.approx(1000) and table.time(to).min() == pytest.approx(0.0, abs=0.01)


def test_the_gap_shrinks_by_stages_and_begins_with_plain_denoising():
    pairs = ShrinkingGap(stages=4)
    shares = []
    for progress in (0.0, 0.24, 0.3, 0.6, 0.99, 1.0):
        at, to = pairs.draw(UNIFORM, VarianceExploding(), progress)
        assert bool((to.ratio < at.ratio).all()) and bool((to.ratio >= pairs.low).all())
        shares.append((to.ratio / at.ratio)[990].item())
    assert shares[0] == shares[1] < shares[2] < shares[3] < shares[4] == shares[5] < 1
    at, to = pairs.draw(UNIFORM, VarianceExploding(), 0.0)
    assert bool((to.ratio[at.ratio < 1] <= pairs.low).all())  # the nearer level is clean where n(t) >= 2


def test_evaluation_draws_the_same_noise_always_at_the_schedules_end():
    nets, batch = {"student": digits_like()}, rows()
    method = Consistency(steps=[8.0], pairs=ShrinkingGap(), solver="none")
    values = [method.evaluate(nets, batch, Step(index, 10, seed=1)).terms["consistency"].sum for index in (0, 7)]
    ended = method.losses(nets, batch, frozenset({"student"}), Step(10, 10, seed=1)).terms["consistency"].sum
    assert values[0] == values[1] == ended
