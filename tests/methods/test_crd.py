"""CRD as a method: heads that learn, a bank that is kept by row, and exact resume."""

from pathlib import Path

import pytest
import torch
from small_images import STEP, SmallCNN, gradients, image_rows, nets_of, resumed_equals_whole, trainer_of
from torch.nn.functional import normalize

from kdlm.losses import ForwardKL
from kdlm.methods import CRD

PAIR = ("embedding", "embedding")


def with_bank(**options):
    return CRD([ForwardKL()], layer=PAIR, width=6, **{"memory": 16, "negatives": 7} | options)


@pytest.fixture(params=["batch", "bank"])
def method(request):
    return CRD(layer=PAIR, width=6) if request.param == "batch" else CRD(layer=PAIR, width=6, memory=8, negatives=5)


def test_both_heads_and_the_student_learn(method):
    found = gradients(method, nets_of(method, SmallCNN(3), SmallCNN(5, seed=1)), image_rows())
    for name in ("heads.student.weight", "heads.teacher.weight", "student.fine.0.weight"):
        assert found[name].any(), name
    assert not any(name.startswith("student.classes") for name in found)


def test_the_order_of_the_images_is_inert(method):
    nets, rows = nets_of(method, SmallCNN(), SmallCNN(5, seed=1)), image_rows()
    whole, other = (gradients(method, nets, rows.select(order)) for order in (range(8), range(7, -1, -1)))
    for name, gradient in whole.items():
        torch.testing.assert_close(other[name], gradient)


def test_with_a_bank_the_gradient_is_the_same_however_the_batch_is_cut():
    method = with_bank(memory=8)
    nets, rows = nets_of(method, SmallCNN(), SmallCNN(5, seed=1)), image_rows()
    whole = gradients(method, nets, rows)
    pieces = [gradients(method, nets, rows.select(part)) for part in (range(3), range(3, 8))]
    for name, gradient in whole.items():
        torch.testing.assert_close(pieces[0][name] + pieces[1][name], gradient)


def test_a_step_moves_the_vectors_of_its_own_rows_and_evaluation_none():
    method = with_bank(momentum=0.25)
    nets, rows = nets_of(method, SmallCNN(), SmallCNN(5, seed=1)), image_rows(4)
    gradients(method, nets, rows)
    before = {side: vectors.clone() for side, vectors in method.bank.of.items()}
    method.stepped(STEP, {})
    ours = nets["student"].with_features(rows.columns["pixel_values"], PAIR[:1])[1]["embedding"]
    seen = normalize(nets["heads"]["student"](ours).float(), dim=-1)
    expected = normalize(0.25 * before["student"][:4] + 0.75 * seen, dim=-1)
    torch.testing.assert_close(method.bank.of["student"][:4], expected)
    assert torch.equal(method.bank.of["teacher"][4:], before["teacher"][4:])
    kept = method.bank.of["teacher"].clone()
    with torch.no_grad():
        assert "contrast" not in method.evaluate(nets, rows.columns, STEP).terms
    method.stepped(STEP, {})
    assert torch.equal(method.bank.of["teacher"], kept)


def test_the_first_batch_is_as_likely_drawn_as_not_whatever_its_order():
    """Z makes the scores of a random bank densities of mean 1 / N, so at the start nothing is overwhelming."""
    method = CRD(layer=PAIR, width=64, memory=2000, negatives=100)
    bank = method._bank(seed=1)
    u = normalize(torch.randn(50, 64, generator=torch.Generator().manual_seed(2)), dim=-1)
    densities = (u @ bank.of["teacher"].T / method.temperature - bank.log_partition).exp()
    assert densities.sum(1).mean().item() == pytest.approx(1, rel=0.1)


def test_a_row_beyond_the_bank_is_an_error():
    method = with_bank(memory=5)
    with pytest.raises(ValueError, match=r"method.memory: row 7 of the data has no place among 5"):
        gradients(method, nets_of(method, SmallCNN(), SmallCNN()), image_rows())


def test_a_run_resumes_exactly_with_its_bank(tmp_path: Path):
    resumed_equals_whole(with_bank, tmp_path)


def test_the_trainer_evaluates_with_a_bank(tmp_path: Path):
    trainer = trainer_of(with_bank(), tmp_path)
    trainer.train()
    assert {"eval_accuracy", "eval_kl_to_teacher"} <= set(trainer.evaluate())
