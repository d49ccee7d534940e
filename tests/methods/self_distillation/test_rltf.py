"""RLTF: what was written after feedback is learned after the prompt alone; the environment's words carry no loss."""

import pytest
import torch
from episodes_by_hand import RETRIES, Reader, batch_of, gradient, run
from self_attempts import trainer, weights

from kdlm.losses import ReverseKL
from kdlm.methods import RLTFFM, RLTFSD
from kdlm.methods.turns import TurnRewards, later_turns, said_in
from kdlm.signal import IGNORE_INDEX

RETRY = {"name": "retry", "turns": 2, "until_right": False, "ask": "{feedback}", "right": "Right.", "wrong": "Wrong."}
LAYOUTS = pytest.mark.parametrize("layout", ["padded", "padding_free"])
SECOND = [(0, [7, 8, 9]), (1, [7, 8]), (3, [7]), (4, [7, 2, 2])]
"""The second attempts of RETRIES, by their episodes."""
ADVANTAGES = {0: 1 - 2 / 3, 1: 0 - 2 / 3, 3: 0.0, 4: 1.0}
"""Their rewards, less the mean of the first attempts at their prompts."""


@LAYOUTS
def test_a_later_turn_is_read_right_after_its_prompt(layout: str) -> None:
    batch = batch_of(RETRIES, layout)
    found = later_turns(batch)
    if layout == "padded":
        sizes = found["attention_mask"].sum(1).tolist()
        read = [row[:size] for row, size in zip(found["input_ids"].tolist(), sizes, strict=True)]
        assert all((row[size:] == IGNORE_INDEX).all() for row, size in zip(found["labels"], sizes, strict=True))
    else:
        starts = (found["position_ids"][0] == 0).nonzero()[:, 0].tolist()
        read = [part.tolist() for part in found["input_ids"][0].tensor_split(starts[1:])]
    assert read == [RETRIES[number][0] + tokens for number, tokens in SECOND]
    assert found["labels"][found["labels"] != IGNORE_INDEX].tolist() == [t for _, tokens in SECOND for t in tokens]
    kept = found["labels"] != IGNORE_INDEX
    assert (batch["input_ids"].flatten()[found["at"][kept]] == found["input_ids"][kept]).all()
    assert (batch["turn"].flatten()[found["at"][kept]] == 1).all()


@LAYOUTS
def test_the_environments_words_are_known_and_those_of_masked_episodes_are_not(layout: str) -> None:
    batch = batch_of(RETRIES, layout)
    assert batch["input_ids"][said_in(batch)].tolist() == [5, 6, 5, 5, 6, 10, 5, 6, 10]
    batch["labels"] = batch["labels"].masked_fill(batch["sequence"] == 0, IGNORE_INDEX)
    assert batch["input_ids"][said_in(batch)].tolist() == [5, 5, 6, 10, 5, 6, 10]


@LAYOUTS
def test_the_second_attempt_is_learned_after_the_prompt_by_how_much_better_it_is_than_first_ones(layout: str) -> None:
    student = Reader()
    terms = run(RLTFSD(policy_weight=0.0), student, batch_of(RETRIES, layout))
    by_hand = torch.stack([ADVANTAGES[n] * student.nats(RETRIES[n][0], tokens) for n, tokens in SECOND]).sum()
    assert terms.terms.keys() == {"distilled"} and terms.terms["distilled"].unit == "sampled"
    torch.testing.assert_close(terms.terms["distilled"].sum, by_hand)
    torch.testing.assert_close(gradient(terms, student), gradient(by_hand, student))


def test_one_worse_than_the_first_ones_gets_less_likely_at_the_prompt_and_a_better_one_more() -> None:
    for number, sign in ((0, 1), (1, -1)):
        student = Reader()
        prompt, second = RETRIES[number][0], dict(SECOND)[number]
        terms = run(RLTFSD(policy_weight=0.0), student, batch_of([RETRIES[number], RETRIES[2]]))
        found, before = gradient(terms, student), student.nats(prompt, second)
        with torch.no_grad():
            student.table -= 1e-3 * found
        assert sign * (before - student.nats(prompt, second)) > 0


@pytest.mark.parametrize("cap", [0.0, 0.5])
def test_negative_advantages_are_capped(cap: float) -> None:
    student = Reader()
    terms = run(RLTFSD(policy_weight=0.0, negative_cap=cap), student, batch_of(RETRIES))
    by_hand = sum(max(-cap, ADVANTAGES[n]) * student.nats(RETRIES[n][0], tokens) for n, tokens in SECOND)
    torch.testing.assert_close(terms.terms["distilled"].sum, by_hand)


def test_each_turn_is_pushed_by_its_own_advantage_in_the_episode() -> None:
    """The first turns of prompt 0 have 0, 1, 1, its second ones 1, 0; those of prompt 1 have 0, 0 and 0, 1."""
    student = Reader()
    batch = batch_of(RETRIES, drawn_from=student)
    policy = run(RLTFSD(), student, batch).terms["policy"]
    by_turn = {
        (0, 0): -2 / 3,
        (1, 0): 1 / 3,
        (2, 0): 1 / 3,
        (0, 1): 1 / 2,
        (1, 1): -1 / 2,
        (3, 1): -1 / 2,
        (4, 1): 1 / 2,
    }
    by_hand = torch.zeros(())
    for (number, turn), advantage in by_turn.items():
        prompt, _, parts, _ = RETRIES[number]
        before = prompt + [token for ids, _ in parts[: 2 * turn] for token in ids]
        by_hand = by_hand + advantage * student.nats(before, parts[2 * turn][0])
    torch.testing.assert_close(gradient(policy.sum, student), gradient(by_hand, student))


def test_what_the_environment_said_has_no_gradient() -> None:
    """Other words in between change nothing in the distilled term."""
    student = Reader()
    other = [
        (prompt, n, [(([1] * 3) if turn < 0 else ids, turn) for ids, turn in parts], r)
        for prompt, n, parts, r in RETRIES
    ]
    ours, theirs = (run(RLTFSD(policy_weight=0.0), student, batch_of(one)) for one in (RETRIES, other))
    assert torch.equal(gradient(ours, student), gradient(theirs, student))


@LAYOUTS
def test_the_parts_of_a_batch_add_up(layout: str) -> None:
    student, whole = Reader(), batch_of(RETRIES, "padded")
    method = RLTFSD()
    terms = run(method, student, whole)
    parts = [batch_of(RETRIES[:3], layout), batch_of(RETRIES[3:], layout)]
    found = [run(method, student, part) for part in parts]
    torch.testing.assert_close(sum(gradient(one, student) for one in found), gradient(terms, student))
    for name, (value, unit) in terms.metrics.items():
        torch.testing.assert_close(sum(one.metrics[name][0] for one in found), value)
        assert unit in method.counts(whole)
    for name, value in method.counts(whole).items():
        assert value == sum(method.counts(part)[name] for part in parts)


def test_episodes_of_one_turn_distil_nothing_and_report_the_same_names() -> None:
    student = Reader()
    some, none = (run(RLTFSD(), student, batch_of(part)) for part in (RETRIES, RETRIES[2:3]))
    assert none.terms.keys() == some.terms.keys() and none.metrics.keys() == some.metrics.keys()
    assert not gradient(none.terms["distilled"].sum, student).any()


# RLTF-FM


@LAYOUTS
def test_the_model_of_feedback_adds_cross_entropy_of_what_the_environment_said(layout: str) -> None:
    student = Reader()
    batch = batch_of(RETRIES, layout, drawn_from=student)
    terms = run(RLTFFM(feedback_weight=0.3), student, batch)
    several = [(x, parts) for x, _, parts, _ in RETRIES if len(parts) > 1]
    by_hand = torch.stack([student.nats(x + parts[0][0], parts[1][0]) for x, parts in several]).sum()
    torch.testing.assert_close(terms.terms["feedback"].sum, by_hand)
    assert RLTFFM().counts(batch)["said"] == 9 and terms.terms["feedback"].unit == "said"
    alone = gradient(run(TurnRewards(), student, batch), student)
    torch.testing.assert_close(gradient(terms, student), alone + 0.3 * gradient(by_hand, student))


def test_without_a_weight_the_model_of_feedback_is_the_policy_gradient_alone() -> None:
    student = Reader()
    batch = batch_of(RETRIES, drawn_from=student)
    terms, plain = run(RLTFFM(feedback_weight=0.0), student, batch), run(TurnRewards(), student, batch)
    assert torch.equal(gradient(terms, student), gradient(plain, student))
    assert all(torch.equal(value, terms.metrics[name][0]) for name, (value, _) in plain.metrics.items())


def test_a_teacher_beside_it_is_asked_about_what_the_student_drew_alone() -> None:
    student, teacher = Reader(), Reader(8)
    batch = batch_of(RETRIES, drawn_from=student)
    with_teacher = [run(method([ReverseKL()]), student, batch, teacher) for method in (RLTFFM, TurnRewards)]
    ours, plain = (terms.terms["token_loss"] for terms in with_teacher)
    torch.testing.assert_close(ours.sum, plain.sum)
    torch.testing.assert_close(gradient(ours.sum, student), gradient(plain.sum, student))


# Runs


@pytest.mark.parametrize("method", [RLTFSD, RLTFFM])
@LAYOUTS
def test_a_run_on_episodes_that_is_killed_ends_as_an_unbroken_one(tmp_path, layout: str, method: type) -> None:
    saves = {"save_strategy": "steps", "save_steps": 2, "environment": RETRY, "samples": 4, "layout": layout}
    whole = weights(trainer(tmp_path / "a", method(), **saves))
    trainer(tmp_path / "b", method(), **saves).train()
    made = trainer(tmp_path / "b", method(), **saves)
    made.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-4"))
    assert all(torch.equal(p.detach(), whole[name]) for name, p in made.student.named_parameters())
    line = made.state.log_history[-2]
    if method is RLTFSD:
        assert line["taught_better"] > 0 and 0 < line["first_reward"] < 1
    else:
        assert line["feedback"] > 0


@pytest.mark.parametrize("method", [RLTFSD, RLTFFM])
def test_micro_batches_of_episodes_do_not_show(tmp_path, method: type) -> None:
    options = {"environment": RETRY, "samples": 4, "max_steps": 2, "optim": "sgd"}
    whole = weights(trainer(tmp_path / "a", method(), **options))
    cut = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}
    parts = weights(trainer(tmp_path / "b", method(), layout="padding_free", **cut, **options))
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-6, atol=1e-7)


def test_losses_without_the_episodes_are_refused() -> None:
    with pytest.raises(ValueError, match="policy_weight"):
        RLTFSD([ReverseKL()], policy_weight=0.0)
