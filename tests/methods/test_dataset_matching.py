"""Dataset distillation: what its two losses are, and which way they pull a synthetic set."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from kdlm.methods import Step
from kdlm.methods.dataset.augmentation import Augmentation
from kdlm.methods.dataset.distribution_matching import FeatureMeanMatching, mean_distance
from kdlm.methods.dataset.evaluation import Evaluation
from kdlm.methods.dataset.experts import Experts, flat_direction, order
from kdlm.methods.dataset.method import seed_of
from kdlm.methods.dataset.networks import MLP, ConvNet, Vectors
from kdlm.methods.dataset.trajectory_matching import TrajectoryMatching, unrolled
from kdlm.models import SyntheticImages

SMALL = MLP(width=6)
SHAPE, CLASSES = (1, 4, 4), 3
MOVED = Augmentation(shift=0.1, turn=20, size=0.2)
STEP = Step(5, 10, seed=3)


def images(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return images whose class is where they are bright, and the classes."""
    labels = torch.arange(count) % CLASSES
    noise = torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed))
    noise[torch.arange(count), 0, labels] += 2
    return noise, labels


def synthetic(per_class: int = 1, **options) -> SyntheticImages:
    return SyntheticImages(*images(CLASSES * per_class, seed=9), learning_rate=0.1, **options)


def mtt(**options) -> TrajectoryMatching:
    settings = {"inner_steps": 3, "expert_epochs": 1, "max_start": 2, "augmentation": Augmentation()} | options
    return TrajectoryMatching(network=SMALL, evaluation=Evaluation(), experts=Experts(count=2), **settings)


def dm(augmentation: Augmentation = MOVED) -> FeatureMeanMatching:
    return FeatureMeanMatching(network=SMALL, augmentation=augmentation, evaluation=Evaluation())


@pytest.mark.parametrize("section", [SMALL, ConvNet(width=4, depth=1)])
def test_steps_on_the_real_images_in_the_experts_own_order_end_where_the_expert_did(section) -> None:
    networks, (shown, labels) = Vectors(section, SHAPE, CLASSES), images(30)
    experts, seed = Experts(count=3, batch_size=8, learning_rate=0.1), 20
    ways = experts.trained(networks, shown, labels, 3, Augmentation(), seed)
    assert torch.equal(ways[1, 0], networks.fresh(seed + 1))
    batches = [(shown[chosen], labels[chosen]) for epoch in (1, 2) for chosen in order(30, seed + 1, epoch).split(8)]
    end = unrolled(networks, ways[1, 1], batches, torch.tensor(0.1))
    assert (end - ways[1, 3]).square().sum() / (ways[1, 1] - ways[1, 3]).square().sum() < 1e-9


@pytest.mark.parametrize("augmentation", [Augmentation(), MOVED])
def test_the_gradient_of_trajectory_matching_is_that_of_finite_differences(augmentation) -> None:
    torch.manual_seed(1)
    student = synthetic(soft_labels=torch.randn(CLASSES, CLASSES)).double()
    networks = Vectors(SMALL, SHAPE, CLASSES)
    ways = torch.stack([torch.stack([networks.fresh(10 * e + t) for t in range(4)]) for e in range(2)]).double()
    batch = {"weights": ways, "index": torch.arange(2)}

    def loss() -> torch.Tensor:
        return (
            mtt(augmentation=augmentation).losses({"student": student}, batch, frozenset(), STEP).terms["matching"].sum
        )

    loss().backward()
    eps = 1e-6
    for parameter in student.parameters():
        flat, slope = parameter.data.view(-1), parameter.grad.view(-1)
        for place in (0, len(flat) // 2, len(flat) - 1):
            before, ends = flat[place].item(), []
            for sign in (1, -1):
                flat[place] = before + sign * eps
                ends.append(loss().item())
            flat[place] = before
            assert slope[place].item() == pytest.approx((ends[0] - ends[1]) / (2 * eps), rel=1e-4, abs=1e-8)


def test_the_start_belongs_to_the_expert_and_the_step_and_not_to_the_batch() -> None:
    student, networks = synthetic(), Vectors(SMALL, SHAPE, CLASSES)
    ways = torch.stack([networks.fresh(t) for t in range(4)])[None].expand(2, -1, -1)
    batch = {"weights": ways, "index": torch.arange(2)}
    one = mtt().losses({"student": student}, batch, frozenset(), STEP).terms["matching"].sum
    parts = [
        mtt().losses({"student": student}, {k: v[i : i + 1] for k, v in batch.items()}, frozenset(), STEP)
        for i in range(2)
    ]
    assert torch.isclose(one, sum(part.terms["matching"].sum for part in parts))


def test_an_inner_step_sees_every_image_once_before_any_again() -> None:
    student = synthetic(per_class=2)
    shown = [targets for _, targets in mtt(inner_batch_size=2).inner_batches(student, STEP)]
    assert sorted(torch.cat(shown).tolist()) == sorted(student.labels.tolist())


def test_the_learned_step_size_stays_positive() -> None:
    student = synthetic()
    optimizer = torch.optim.SGD([student.log_learning_rate], lr=50.0)
    student.learning_rate.backward()
    optimizer.step()
    assert 0 < student.learning_rate < 0.1


def test_without_a_step_size_trajectory_matching_says_what_is_missing() -> None:
    student = SyntheticImages(*images(3))
    batch = {"weights": torch.randn(1, 4, 200), "index": torch.arange(1)}
    with pytest.raises(ValueError, match=r"student\.learning_rate"):
        mtt().losses({"student": student}, batch, frozenset(), STEP)


def test_a_flat_step_is_the_gradient_at_the_worst_place_less_what_is_perpendicular_to_it() -> None:
    networks, (shown, labels) = Vectors(SMALL, SHAPE, CLASSES), images(12)
    shown, weights = shown.double(), networks.fresh(0).double()

    def slope(at: torch.Tensor) -> torch.Tensor:
        at = at.detach().requires_grad_()
        return torch.autograd.grad(cross_entropy(networks.logits(at, shown), labels), at)[0]

    here, rho = slope(weights), 0.1
    radius = rho * weights.square() * here / (weights * here).norm()
    assert (radius / weights).norm() == pytest.approx(rho)  # adaptive: the radius is of the share of each weight
    there = slope(weights + radius)
    assert torch.equal(flat_direction(networks, 0, 0.4)(weights, shown, labels), here)
    assert torch.allclose(flat_direction(networks, rho, 0)(weights, shown, labels), there)
    against = there - flat_direction(networks, rho, 0.4)(weights, shown, labels)
    assert abs(against @ there) < 1e-9 * against.norm() * there.norm() + 1e-12
    assert torch.allclose(against @ here, 0.4 * (here @ here - (here @ there) ** 2 / (there @ there)))


def test_the_loss_rises_less_around_an_expert_that_was_trained_to_be_flat() -> None:
    networks, (shown, labels) = Vectors(SMALL, SHAPE, CLASSES), images(60)

    def sharpness(**options) -> float:
        experts = Experts(count=4, batch_size=20, learning_rate=0.2, **options)
        ends = experts.trained(networks, shown, labels, 40, Augmentation(), 0)[:, -1]
        rises = []
        for weights in ends:
            at = weights.clone().requires_grad_()
            loss = cross_entropy(networks.logits(at, shown), labels)
            (slope,) = torch.autograd.grad(loss, at)
            radius = 0.3 * weights.square() * slope / (weights * slope).norm()
            rises.append((cross_entropy(networks.logits(weights + radius, shown), labels) - loss).item())
        return sum(rises) / len(rises)

    assert sharpness(rho=0.3, alpha=0.1) < 0.8 * sharpness()


def test_distribution_matching_is_the_papers_sum_over_classes_and_its_gradient_does_not_see_the_split() -> None:
    real, ours = torch.randn(12, 5).double(), torch.randn(6, 5).double().requires_grad_()
    labels, own = torch.tensor([0, 1, 2] * 4), torch.tensor([0, 0, 1, 1, 2, 2])
    whole = mean_distance(real, labels, ours, own)
    paper = sum((real[labels == c].mean(0) - ours[own == c].mean(0)).square().sum() for c in range(3))
    assert torch.isclose(whole, 4 * paper)
    (expected,) = torch.autograd.grad(whole, ours)
    for cut in (1, 5):
        parts = mean_distance(real[:cut], labels[:cut], ours, own) + mean_distance(real[cut:], labels[cut:], ours, own)
        assert torch.allclose(torch.autograd.grad(parts, ours)[0], expected)


def test_distribution_matching_ends_at_the_real_images_and_leaves_unlabelled_ones_out() -> None:
    shown, labels = images(6)
    student = SyntheticImages(shown, labels)
    batch = {"pixel_values": torch.cat([shown, shown[:1] + 9]), "labels": torch.cat([labels, torch.tensor([-100])])}
    term = dm().losses({"student": student}, batch | {"index": torch.arange(7)}, frozenset(), STEP).terms["matching"]
    assert term.sum < 1e-9


def test_distribution_matching_asks_another_network_at_every_step_and_the_same_one_in_one() -> None:
    shown, labels = images(6)
    batch = {"pixel_values": shown, "labels": labels, "index": torch.arange(6)}

    def at(index: int) -> float:
        student = SyntheticImages(*images(3, seed=9))
        return dm().losses({"student": student}, batch, frozenset(), Step(index, 10)).terms["matching"].sum.item()

    state = torch.get_rng_state()
    assert at(0) == at(0) != at(1)
    assert torch.equal(state, torch.get_rng_state())
    assert seed_of(Step(0, 10, seed=1), "network") != seed_of(Step(0, 10, seed=2), "network")


def test_an_augmentation_is_one_draw_for_all_images_and_lets_gradients_through() -> None:
    shown = images(2)[0].requires_grad_()
    moved = MOVED(shown, seed=4)
    assert torch.allclose(MOVED(shown[1:], seed=4), moved[1:]) and not torch.allclose(MOVED(shown, seed=5), moved)
    assert Augmentation()(shown, seed=4) is shown
    moved.sum().backward()
    assert shown.grad.abs().sum() > 0
    plain = torch.full((1, *SHAPE), 0.3)
    assert torch.allclose(MOVED(plain, seed=4), plain)


def test_a_network_of_a_vector_is_the_network_and_its_features_are_what_its_head_gets() -> None:
    for section in (SMALL, ConvNet(width=4, depth=2)):
        networks, shown = Vectors(section, SHAPE, CLASSES), images(5)[0]
        vector = networks.fresh(2)
        torch.manual_seed(2)
        module = section.build(SHAPE, CLASSES)
        assert torch.allclose(networks.logits(vector, shown), module(shown))
        assert torch.allclose(module.head(networks.features(vector, shown)), module(shown))
    with pytest.raises(ValueError, match=r"network\.depth: 3 halvings"):
        ConvNet(depth=3).build(SHAPE, CLASSES)


def test_distribution_matching_refuses_to_leave_labels_and_step_size_unlearned() -> None:
    with pytest.raises(ValueError, match="leave out soft_labels and learning_rate"):
        dm().losses({"student": synthetic()}, {}, frozenset(), STEP)


def test_another_student_is_refused_with_the_section_it_takes() -> None:
    with pytest.raises(ValueError, match="name: synthetic_images"):
        dm().losses({"student": torch.nn.Linear(1, 1)}, {}, frozenset(), STEP)
