"""SCoRe: who is credited with what in its two stages, and where the student is held."""

import pytest
import torch
from episodes_by_hand import RETRIES, Reader, batch_of, gradient, run
from self_attempts import trainer, weights

from kdlm.losses import ReverseKL, kept_rows
from kdlm.methods import SCoRe, SCoReSection
from kdlm.methods.turns import TurnRewards
from kdlm.teachers import SelfTeacher

AGAIN = {"name": "retry", "turns": 2, "until_right": False, "ask": "There may be an error. Try again:"}
NAMES = ["right_to_right", "right_to_wrong", "wrong_to_right", "wrong_to_wrong"]


def held(student: Reader, teacher: Reader, batch: dict, turns: list[int]) -> torch.Tensor:
    """Return the sum of KL(q || p) at the tokens that were drawn in these turns."""
    rows = kept_rows(batch["labels"])
    q, p = (one(batch, rows).logits.log_softmax(-1) for one in (student, teacher))
    drawn = torch.isin(rows.of_labels(batch["turn"]), torch.tensor(turns))
    return ((q.exp() * (q - p.detach())).sum(-1) * drawn).sum()


def test_without_bonus_and_kl_it_is_the_policy_gradient_of_two_turns() -> None:
    student = Reader()
    batch = batch_of(RETRIES, drawn_from=student)
    ours = run(SCoRe(stage=2, bonus=0.0, kl=0.0), student, batch)
    plain = run(TurnRewards(), student, batch)
    assert ours.terms.keys() == {"policy"}
    assert torch.equal(gradient(ours, student), gradient(plain, student))
    assert "teacher" not in SCoRe(kl=0.0).needs and "teacher" in SCoRe().needs


def test_a_second_attempt_that_goes_wrong_is_worth_minus_the_bonus_and_the_first_does_not_know() -> None:
    batch = batch_of(RETRIES)
    worth = SCoRe(stage=2, bonus=10.0).worth(batch)
    first, second = worth.unbind(1)
    assert first.tolist() == [0.0, 1.0, 1.0, 0.0, 0.0]
    assert second[[0, 1, 3, 4]].tolist() == [11.0, -10.0, 0.0, 11.0] and second[2].isnan()
    later = SCoRe(stage=2, bonus=10.0, discount=0.5).worth(batch)
    assert later[:, 0].tolist() == [0.5, 1.0, 1.0, 0.0, 0.5]  # of the second's reward, not of the bonus
    assert torch.equal(later[:, 1].nan_to_num(), second.nan_to_num())


@pytest.mark.parametrize("discount", [0.0, 1.0])
def test_in_stage_one_rewards_reach_the_first_turn_only_where_that_is_asked_for(discount: float) -> None:
    """Two episodes whose second attempts differ, so that the first turns' tokens tell who was credited."""
    student = Reader()
    batch = batch_of(RETRIES[:2], drawn_from=student)
    found = gradient(run(SCoRe(kl=0.0, discount=discount), student, batch), student)
    second = gradient(run(SCoRe(kl=0.0), student, batch), student)
    firsts = 0.5 * (student.nats([1, 2], [3, 4]) - student.nats([1, 2], [3]))
    torch.testing.assert_close(found, second + discount * gradient(firsts, student))
    seconds = 0.5 * (student.nats([1, 2, 3, 4, 5, 6], [7, 8, 9]) - student.nats([1, 2, 3, 5], [7, 8]))
    torch.testing.assert_close(second, gradient(seconds, student))


@pytest.mark.parametrize(("stage", "turns", "kl"), [(1, [0], 0.1), (2, [0, 1], 0.01)])
@pytest.mark.parametrize("layout", ["padded", "padding_free"])
def test_the_kl_is_at_the_first_turn_in_stage_one_and_at_both_in_stage_two(
    layout: str, stage: int, turns: list[int], kl: float
) -> None:
    student, teacher = Reader(), Reader(8)
    batch = batch_of(RETRIES, layout, drawn_from=student)
    ours = gradient(run(SCoRe(stage=stage), student, batch, teacher), student)  # type: ignore[arg-type]
    plain = gradient(run(SCoRe(stage=stage, kl=0.0), student, batch), student)  # type: ignore[arg-type]
    expected = kl * gradient(held(student, teacher, batch, turns), student)
    torch.testing.assert_close(ours - plain, expected)
    assert expected.abs().max() > 1e-4


def test_the_four_transitions_are_counted() -> None:
    student = Reader()
    batch = batch_of([*RETRIES, ([1, 2], 0, [([3], 0), ([5], -1), ([7], 1)], [1.0, 1.0])], drawn_from=student)
    metrics = run(SCoRe(kl=0.0), student, batch).metrics
    assert [int(metrics[name][0]) for name in NAMES] == [1, 1, 2, 1]
    assert {metrics[name][1] for name in NAMES} == {"completions"}
    alone = run(SCoRe(kl=0.0), student, batch_of(RETRIES[2:3])).metrics
    assert alone.keys() == metrics.keys() and not any(alone[name][0] for name in NAMES)
    ended = batch_of([*RETRIES[2:3]] * 2) | {"weight": torch.tensor([0.5, 2.0])}  # all after one turn, weighed
    assert not any(run(SCoRe(kl=0.0), student, ended).metrics[name][0] for name in NAMES)


def test_the_parts_of_a_batch_add_up() -> None:
    student, teacher = Reader(), Reader(8)
    for method in (SCoRe(), SCoRe(stage=2, scaled=True), SCoRe(stage=2, leave_one_out=True)):
        whole = gradient(run(method, student, batch_of(RETRIES), teacher), student)
        parts = [run(method, student, batch_of(part, "padding_free"), teacher) for part in (RETRIES[:3], RETRIES[3:])]
        torch.testing.assert_close(sum(gradient(part, student) for part in parts), whole)


@pytest.mark.parametrize("stage", [1, 2])
def test_a_run_that_is_killed_ends_as_an_unbroken_one(tmp_path, stage: int) -> None:
    saves = {"save_strategy": "steps", "save_steps": 2, "environment": AGAIN, "samples": 4}

    def make(name: str):
        return trainer(tmp_path / name, SCoRe(stage=stage), SelfTeacher("start"), **saves)  # type: ignore[arg-type]

    whole = weights(make("a"))
    make("b").train()
    made = make("b")
    made.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-4"))
    assert all(torch.equal(p.detach(), whole[name]) for name, p in made.student.named_parameters())
    line = made.state.log_history[-2]
    assert 0.5 < sum(line[name] for name in NAMES) <= 1 and line["reverse_kl"] > 0


def test_what_does_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="takes none"):
        SCoRe([ReverseKL()])
    with pytest.raises(ValueError, match="stage 1"):
        SCoReSection(bonus=3.0)
