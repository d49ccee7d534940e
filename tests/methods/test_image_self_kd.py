"""Image methods without a teacher of their own: PS-KD, USKD; MEAL V2's discriminator."""

import pytest
import torch
from small_images import STEP, SmallCNN, gradients, image_rows, nets_of, resumed_equals_whole, trainer_of
from test_image_kd import PIECES, step_gradient
from torch.nn.functional import cross_entropy

from kdlm.losses import CrossEntropy, ForwardKL, uskd
from kdlm.methods import MEALV2, PSKD, USKD, ImageKD, MEALV2Section, PSKDSection, Step, TokenPSKDSection, USKDSection


def at(epoch: int) -> Step:
    return Step(index=2 * epoch, total=8, epoch=epoch, epochs=4)


def test_ps_kd_begins_as_cross_entropy():
    method, plain = PSKD(), ImageKD([CrossEntropy()])
    student = SmallCNN()
    nets, rows = nets_of(method, student, SmallCNN()), image_rows()
    terms = method.losses(nets, rows.columns, frozenset({"student"}), at(0)).terms
    expected = plain.losses(nets, rows.columns, frozenset({"student"}), at(0)).terms
    assert set(terms) == {"label_loss"}
    torch.testing.assert_close(terms["label_loss"].sum, expected["label_loss"].sum)


def test_ps_kd_descends_to_label_and_earlier_self_by_the_share_of_the_epoch():
    method, student = PSKD(end=0.8), SmallCNN()
    nets, rows = nets_of(method, student, SmallCNN()), image_rows()
    nets["previous"].module.double()
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in nets["previous"].module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    rows.columns["labels"][:] = torch.arange(8) % 4  # all labelled: one unit
    images, labels = rows.columns["pixel_values"], rows.columns["labels"]
    terms = method.losses(nets, rows.columns, frozenset({"student"}), at(3)).terms
    value = sum(term.weight * term.sum for term in terms.values())
    target = 0.2 * torch.eye(4, dtype=torch.float64)[labels] + 0.8 * nets["previous"](images).softmax(-1).detach()
    torch.testing.assert_close(value, cross_entropy(student(images), target, reduction="sum"))
    value.backward()
    assert all(parameter.grad is None for parameter in nets["previous"].module.parameters())


def test_ps_kds_earlier_self_is_the_student_as_the_epoch_ended(tmp_path):
    """16 images in batches of 8: four steps are two epochs."""
    trainer = trainer_of(PSKD(), tmp_path)
    start = [p.clone() for p in trainer.student.parameters()]
    trainer.train()
    assert [role for role in trainer.method.roles] == ["student", "previous"]
    previous = list(trainer.networks.averages["previous"].parameters())
    assert not any(torch.equal(a, b) for a, b in zip(start, previous, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(trainer.student.parameters(), previous, strict=True))


@pytest.mark.parametrize("cut", [2, 3])
def test_ps_kd_resumes_exactly_within_an_epoch_and_at_its_end(tmp_path, cut):
    """Step 2 of 6 ends an epoch: its checkpoint is written before the earlier self is taken anew."""
    whole = trainer_of(PSKD(), tmp_path / "whole", max_steps=6)
    whole.train()
    trainer_of(PSKD(), tmp_path / "cut", max_steps=6, save_strategy="steps", save_steps=cut).train()
    second = trainer_of(PSKD(), tmp_path / "cut", max_steps=6)
    second.train(resume_from_checkpoint=str(tmp_path / "cut" / f"checkpoint-{cut}"))
    for role in ("student", "previous"):
        expected = whole.networks.module_of(role).state_dict()
        for name, tensor in second.networks.module_of(role).state_dict().items():
            assert torch.equal(tensor, expected[name]), (role, name)


def test_uskd_resumes_exactly_with_its_weak_head_and_mean(tmp_path):
    resumed_equals_whole(lambda: USKD([CrossEntropy()], feature="fine"), tmp_path)


@pytest.mark.parametrize(
    "method",
    [lambda: PSKD(), lambda: USKD([CrossEntropy()], feature="coarse"), lambda: MEALV2(adversarial="reversed")],
    ids=["ps_kd", "uskd", "meal_v2"],
)
def test_how_a_step_is_cut_is_inert(method):
    made, rows = method(), image_rows()
    nets = nets_of(made, SmallCNN(), SmallCNN(5, seed=1))
    whole = step_gradient(made, nets, [range(8)], rows)
    for name, gradient in step_gradient(made, nets, PIECES, rows).items():
        torch.testing.assert_close(gradient, whole[name])


def test_uskds_weak_head_learns_by_labels_and_its_ranking_hands_the_student_no_gradient():
    method = USKD(feature="fine", alpha=0.0, beta=0.0)
    nets, rows = nets_of(method, SmallCNN(), SmallCNN()), image_rows()
    found = gradients(method, nets, rows)
    assert found["weak.weight"].any() and found["student.fine.0.weight"].any()
    assert not any(found[name].any() for name in found if name.startswith(("student.classes", "student.coarse")))


def test_uskd_compares_with_the_mean_of_the_step_before_and_with_an_even_one_at_first():
    method = USKD(feature="fine")
    nets, rows = nets_of(method, SmallCNN(), SmallCNN()), image_rows()
    images, labels = rows.columns["pixel_values"], rows.columns["labels"]
    logits, ours = nets["student"].with_features(images, ["fine"])
    weak = nets["weak"](ours["fine"].mean((2, 3)))
    for mean in (1 / 16, 0.3):
        terms = method.losses(nets, rows.columns, frozenset({"student"}), STEP)
        torch.testing.assert_close(terms.terms["uskd"].sum, uskd(logits, weak, labels, mean_square=mean).sum())
        method.stepped(STEP, {"square": torch.tensor(0.3)})
    known = labels >= 0
    squares = logits.softmax(-1)[known].gather(-1, labels[known, None]).square().sum()
    assert terms.metrics["square"][0].item() == pytest.approx(squares.item(), rel=1e-6)


def test_meal_v2_without_a_discriminator_is_forward_kl():
    rows, found = image_rows(), []
    for method in (MEALV2(), ImageKD([ForwardKL()])):
        found.append(gradients(method, nets_of(method, SmallCNN(), SmallCNN(5, seed=1)), rows))
    assert all(torch.equal(gradient, found[1][name]) for name, gradient in found[0].items())


def test_reversing_turns_the_students_gradient_exactly_and_leaves_the_discriminators():
    rows, found = image_rows(), {}
    for kind in ("released", "reversed"):
        method = MEALV2(adversarial=kind)
        torch.manual_seed(2)
        nets = nets_of(method, SmallCNN(), SmallCNN(5, seed=1))
        step = method.losses(nets, rows.columns, frozenset({"student"}), STEP)
        step.terms["discriminator"].sum.backward()
        student = nets["student"].module
        found[kind] = {f"student.{n}": p.grad for n, p in student.named_parameters() if p.grad is not None}
        found[kind] |= {n: p.grad for n, p in nets["discriminator"].named_parameters()}
        assert all(p.grad is None for p in nets["teacher"].module.parameters())
    assert any(gradient.any() for name, gradient in found["released"].items() if name.startswith("student"))
    for name, gradient in found["released"].items():
        sign = -1 if name.startswith("student.") else 1
        torch.testing.assert_close(found["reversed"][name], sign * gradient)


def test_sections_refuse_what_makes_no_sense_with_them():
    for section in (PSKDSection(), TokenPSKDSection()):
        with pytest.raises(ValueError, match="a loss of its own"):
            section.build([CrossEntropy()], None)
    with pytest.raises(ValueError, match="uskd has no teacher"):
        USKDSection(feature="fine").build([ForwardKL()], None)
    with pytest.raises(ValueError, match="none has no discriminator"):
        MEALV2Section(weight=2.0).build([], None)
