"""Image methods on logits: rows without a label, micro-batches, what the losses reduce to, what evaluation reports."""

import pytest
import torch
from small_images import STEP, SmallCNN, gradients, image_rows, nets_of, resumed_equals_whole, trainer_of
from torch.nn.functional import cross_entropy, kl_div

from kdlm.losses import DKD, NKD, OFA, CrossEntropy, ForwardKL
from kdlm.methods import DefensiveDistillation, ImageKD, ImageKDSection

PIECES = (range(3), range(3, 8))


def step_gradient(method, nets, pieces, rows):
    """Return the gradient of a whole step, given in pieces: each term over its unit's count in the whole."""
    whole = method.counts(rows.columns)
    for net in nets.values():
        getattr(net, "module", net).zero_grad()
    for part in pieces:
        terms = method.losses(nets, rows.select(part).columns, frozenset({"student"}), STEP).terms
        sum(term.weight * term.sum / whole[term.unit] for term in terms.values()).backward()
    return {name: p.grad.clone() for name, p in nets["student"].module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("loss", [ForwardKL(temperature=4.0), DKD(beta=2.0), NKD(), OFA()], ids=lambda loss: loss.name)
def test_how_a_step_is_cut_is_inert_where_some_images_have_no_label(loss):
    method = ImageKD([CrossEntropy(weight=0.5), loss])
    nets, rows = nets_of(method, SmallCNN(), SmallCNN(5, seed=1)), image_rows()
    whole = step_gradient(method, nets, [range(8)], rows)
    for name, gradient in step_gradient(method, nets, PIECES, rows).items():
        torch.testing.assert_close(gradient, whole[name])


def test_labels_teach_by_their_number_and_the_teacher_by_all_images():
    method = ImageKD([CrossEntropy(weight=0.25), ForwardKL(temperature=2.0)])
    student, teacher, rows = SmallCNN(), SmallCNN(5, seed=1), image_rows()
    nets, images, labels = nets_of(method, student, teacher), *(rows.columns[k] for k in ("pixel_values", "labels"))
    found = step_gradient(method, nets, [range(8)], rows)
    logits, known = student(images), labels >= 0
    hard = cross_entropy(logits[known], labels[known])
    log_p = (teacher(images) / 2).log_softmax(-1)
    soft = 4 * kl_div((logits / 2).log_softmax(-1), log_p, log_target=True, reduction="sum") / 8
    expected = torch.autograd.grad(0.25 * hard + soft, list(student.parameters()))
    for (name, _), gradient in zip(student.named_parameters(), expected, strict=True):
        torch.testing.assert_close(found[name], gradient)


def test_the_class_of_an_unlabelled_image_is_inert_where_no_teacher_is_asked():
    method = ImageKD([CrossEntropy()])
    nets, rows = nets_of(method, SmallCNN(), SmallCNN(seed=1)), image_rows()
    before = gradients(method, nets, rows)
    rows.columns["pixel_values"][rows.columns["labels"] < 0] = 9.0
    for name, gradient in gradients(method, nets, rows).items():
        torch.testing.assert_close(gradient, before[name])
    assert method.needs == {"images"} and ImageKD([ForwardKL()]).needs == {"images", "teacher.classes"}


def test_the_teachers_equal_teaches_nothing():
    method = ImageKD([ForwardKL(temperature=4.0)])
    found = gradients(method, nets_of(method, SmallCNN(), SmallCNN()), image_rows())
    assert found["loss"] < 1e-12 and all(g.abs().max() < 1e-8 for n, g in found.items() if n != "loss")


def test_evaluation_is_the_same_however_the_rows_are_cut(tmp_path):
    figures = []
    for size in (2, 6):
        trainer = trainer_of(ImageKD([CrossEntropy(), ForwardKL()]), tmp_path, per_device_eval_batch_size=size)
        figures.append({k: v for k, v in trainer.evaluate().items() if "runtime" not in k and "per_second" not in k})
    assert {"eval_accuracy", "eval_ece", "eval_brier", "eval_cross_entropy", "eval_kl_to_teacher"} <= figures[0].keys()
    for name, value in figures[0].items():
        assert value == pytest.approx(figures[1][name], abs=1e-6), name


def test_a_run_resumes_exactly(tmp_path):
    resumed_equals_whole(lambda: ImageKD([CrossEntropy(), ForwardKL()]), tmp_path)


def test_image_kd_without_losses_says_which_ones_there_could_be():
    with pytest.raises(ValueError, match="image_kd needs at least one"):
        ImageKDSection().build([], None)


def test_defensive_distillation_at_temperature_one_is_image_kd():
    losses = [CrossEntropy(), ForwardKL()]
    rows = image_rows()
    found = []
    for method in (ImageKD(losses), DefensiveDistillation(losses, temperature=1.0)):
        found.append(gradients(method, nets_of(method, SmallCNN(), SmallCNN(5, seed=1)), rows))
    for name, gradient in found[0].items():
        assert torch.equal(gradient, found[1][name])


def test_defensive_distillation_compares_logits_over_the_temperature():
    student, teacher, rows = SmallCNN(), SmallCNN(5, seed=1), image_rows()
    method = DefensiveDistillation([ForwardKL()], temperature=20.0)
    value = gradients(method, nets_of(method, student, teacher), rows)["loss"]
    ours, theirs = (net(rows.columns["pixel_values"]) / 20 for net in (student, teacher))
    expected = kl_div(ours.log_softmax(-1), theirs.log_softmax(-1), log_target=True, reduction="sum")
    torch.testing.assert_close(value, expected.detach())
