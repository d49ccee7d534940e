"""hidden_kd with `distance: rkd`: relations between positions, without projectors."""

import torch

from kdlm.losses import kept_rows, rkd_angle, rkd_distance
from kdlm.methods import HiddenKD, HiddenKDSection, Step
from kdlm.models import Predictor
from kdlm.sandbox import build

STEP = Step(index=2, total=10, seed=3)


def nets() -> dict[str, Predictor]:
    from transformers import AutoModelForCausalLM

    opened = {
        role: AutoModelForCausalLM.from_pretrained(build(f"code-{role}-tiny", progress=None)).double()
        for role in ("student", "teacher")
    }
    return {role: Predictor(model) for role, model in opened.items()}


def batch(length: int = 6) -> dict[str, torch.Tensor]:
    ids = torch.randint(5, 500, (2, length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids}


def test_nothing_is_learned_beside_the_student_and_layers_are_mapped():
    method = HiddenKDSection(distance="rkd").build([], None)
    assert set(method.roles) == {"student"}
    found = method.losses(nets(), batch(), frozenset(), STEP)
    assert method.layers == [(0, 1)] and found.terms["hidden"].sum > 0


def test_with_room_for_all_positions_it_is_the_relational_loss_of_them():
    both, rows = nets(), batch()
    value = HiddenKD(layers=[(0, 1)], distance="rkd").losses(both, rows, frozenset(), STEP).terms["hidden"].sum
    kept = kept_rows(rows["labels"])
    _, ours = both["student"].with_layers(rows, kept, [0])
    _, theirs = both["teacher"].with_layers(rows, kept, [1])
    expected = (rkd_distance(ours[0], theirs[0]) + 2 * rkd_angle(ours[0], theirs[0])).sum()
    torch.testing.assert_close(value, expected)


def test_fewer_positions_stand_for_all_and_change_from_step_to_step():
    both, rows = nets(), batch(12)
    method = HiddenKD(layers=[(0, 1)], distance="rkd", related=5)
    sums = [method.losses(both, rows, frozenset(), Step(i, 10, seed=3)).terms["hidden"].sum.item() for i in (0, 1, 0)]
    assert sums[0] == sums[2] != sums[1]
    loss = method.losses(both, rows, frozenset(), STEP).terms["hidden"].sum
    loss.backward()
    assert any(p.grad is not None and p.grad.any() for p in both["student"].module.parameters())


def test_equal_models_cost_nothing():
    both = nets()
    same = {"student": both["teacher"], "teacher": both["teacher"]}
    terms = HiddenKD(layers=[(1, 1)], distance="rkd").losses(same, batch(), frozenset(), STEP).terms
    assert terms["hidden"].sum < 1e-20
