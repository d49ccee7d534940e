"""SD-Zero: the reviser reads the attempt, to the token; revisions that are wrong, and what is before them, stay out."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from self_attempts import seen, trainer, weights

from kdlm.check import check
from kdlm.data.turns import Between
from kdlm.losses import ForwardKL, ReverseKL
from kdlm.methods import SDZero, SDZeroRevision, Step
from kdlm.recipe import load
from kdlm.rollouts import SAID
from kdlm.rollouts.rows import beside
from kdlm.signal import IGNORE_INDEX, Dense
from kdlm.teachers import SelfTeacher

RETRY = {"name": "retry", "turns": 2, "until_right": False, "ask": "{feedback}", "right": "Right.", "wrong": "Wrong."}
VOCAB = 13
RECIPES = Path(__file__).parents[3] / "recipes" / "sandbox"


# The second phase


@pytest.mark.parametrize("layout", ["padded", "padding_free"])
def test_the_reviser_reads_prompt_attempt_control_and_the_attempt_again(tmp_path, layout):
    made = trainer(tmp_path, SDZero(), SelfTeacher("current"), samples=2, layout=layout, max_steps=1)
    written = []
    told = made.method.told
    made.method.told = lambda all_of_them: written.extend(all_of_them) or told(all_of_them)
    (batch,) = seen(made)
    between = Between(made.processing_class, {made.processing_class.eos_token_id})
    expected = []
    for one in written:
        y, control = one.completion.ids, SDZero().right if one.reward == 1 else SDZero().wrong
        cut = one.completion.stop == "length"
        expected.append([*one.prompt, *([] if cut else [*y, *between(one.prompt, control)]), *y])
    assert batch["informed"].tolist() == [one.completion.stop == "end" for one in written]
    assert {True, False} == set(batch["informed"].tolist()) and {0.0, 1.0} == {one.reward for one in written}
    theirs = batch["theirs"]["input_ids"]
    if layout == "padded":
        sizes = batch["theirs"]["attention_mask"].sum(-1).tolist()
        assert [row[:size] for row, size in zip(theirs.tolist(), sizes, strict=True)] == expected
    else:
        assert theirs[0].tolist() == [token for row in expected for token in row]


def test_a_reviser_that_is_asked_what_the_generator_is_teaches_exactly_nothing(tmp_path):
    method = SDZero()
    method.told = lambda written: [one.prompt for one in written]  # type: ignore[method-assign]
    made = trainer(tmp_path, method, SelfTeacher("current"), max_steps=2, optim="sgd")
    before = {name: p.detach().clone() for name, p in made.student.named_parameters()}
    after = weights(made)
    assert made.state.log_history[0]["informed"] == 1.0
    assert abs(made.state.log_history[0]["loss"]) < 1e-12
    for name, value in after.items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=1e-12)


def test_without_rewards_nothing_is_told_and_nothing_moves(tmp_path):
    method = SDZero()
    method.told = lambda written: [""] * len(written)  # type: ignore[method-assign]
    made = trainer(tmp_path, method, max_steps=2)
    before = {name: p.detach().clone() for name, p in made.student.named_parameters()}
    assert all(torch.equal(value, before[name]) for name, value in weights(made).items())
    assert made.state.log_history[0]["loss"] == 0.0


def test_a_reward_that_is_no_number_is_none_and_is_in_no_mean(tmp_path):
    made = trainer(tmp_path, SDZero(), reward=lambda texts, rows: [math.nan, *[1.0] * (len(texts) - 1)], max_steps=1)
    (batch,) = seen(made)
    assert batch["informed"][0].item() is False
    assert made.state.log_history[0]["rollout/reward"] == 1.0


def test_the_direction_is_the_recipes_and_reverse_by_default(tmp_path):
    ours, reverse, forward = (
        weights(trainer(tmp_path, SDZero(losses), max_steps=1)) for losses in ([], [ReverseKL()], [ForwardKL()])
    )
    assert all(torch.equal(ours[name], reverse[name]) for name in ours)
    assert any(not torch.equal(ours[name], forward[name]) for name in ours)


def test_the_loss_on_wrong_attempts_is_told_apart(tmp_path):
    for reward, share in (((lambda texts, rows: [0.0] * len(texts)), 1), ((lambda texts, rows: [1.0] * len(texts)), 0)):
        made = trainer(tmp_path, SDZero(), reward=reward, max_steps=1)
        weights(made)
        line = made.state.log_history[0]
        assert line["loss"] > 0 and line["wrong"] == share
        assert line["loss_wrong"] == pytest.approx(line["loss"] * share, rel=1e-3, abs=1e-12)


def test_a_killed_second_phase_ends_as_an_unbroken_one(tmp_path):
    saves = {"save_strategy": "steps", "save_steps": 2}

    def make(name: str) -> Any:
        return trainer(tmp_path / name, SDZero(), SelfTeacher("snapshot", every=3), **saves)

    whole = weights(make("a"))
    make("b").train()
    made = make("b")
    made.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-4"))
    assert all(torch.equal(p.detach(), whole[name]) for name, p in made.student.named_parameters())


# The first phase

EPISODES = [  # prompt, turns (SAID: what stands between), rewards
    ([1, 2], [([3, 4], 0), ([5, 6], SAID), ([7, 8, 9], 1)], [0.0, 1.0]),
    ([1], [([3], 0), ([5], SAID), ([7, 8], 1)], [1.0, 0.0]),  # a revision that went wrong
    ([1, 2, 3], [([4, 5, 6, 7], 0)], [1.0]),  # no revision
    ([9], [([3, 4], 0), ([5, 6, 10], SAID), ([7], 1)], [1.0, 1.0]),
]


def batch_of(episodes: list[Any], layout: str = "padded", *, data: bool = False) -> dict[str, torch.Tensor]:
    from kdlm.data import Collator

    rows, turns = [], []
    for prompt, parts, _ in episodes:
        said = [(token, turn) for ids, turn in parts for token in ids]
        labels = [token if turn != SAID else IGNORE_INDEX for token, turn in said]
        rows.append({"input_ids": prompt + [t for t, _ in said], "labels": [IGNORE_INDEX] * len(prompt) + labels})
        turns.append([SAID] * len(prompt) + [turn for _, turn in said])
    batch: Any = Collator(0, layout=layout)(rows)  # type: ignore[arg-type]
    if not data:
        width = max(len(rewards) for *_, rewards in episodes)
        batch["turn"] = beside(batch, turns, torch.int64, SAID)
        batch["turn_rewards"] = torch.tensor([r + [float("nan")] * (width - len(r)) for *_, r in episodes])
    return batch


class Bigram:
    """Logits of the next token by the last, as a student."""

    def __init__(self):
        draw = torch.Generator().manual_seed(3)
        self.table = torch.randn(VOCAB, VOCAB, generator=draw, dtype=torch.float64).requires_grad_()

    def __call__(self, batch, rows):
        return Dense(self.table[rows.select(batch["input_ids"])])


def run(student: Bigram, batch: dict[str, torch.Tensor]) -> Any:
    return SDZeroRevision().losses({"student": student}, batch, frozenset({"student"}), Step(0, 10))


def nats(student: Bigram, tokens: list[int], start: int) -> torch.Tensor:
    """Cross-entropy of all tokens from `start` on."""
    logs = student.table.log_softmax(-1)
    return -sum((logs[a, b] for a, b in zip(tokens[start - 1 :], tokens[start:], strict=False)), torch.zeros(()))


@pytest.mark.parametrize("layout", ["padded", "padding_free"])
def test_right_revisions_are_learned_twice_and_what_is_before_them_once(layout):
    student, batch = Bigram(), batch_of(EPISODES, layout)
    terms = run(student, batch)
    texts = [(prompt, [t for ids, _ in parts for t in ids], parts[-1][0]) for prompt, parts, _ in EPISODES]
    right = [texts[0], texts[3]]
    generation = sum(nats(student, prompt + said, len(prompt)) for prompt, said, _ in right)
    revision = sum(nats(student, prompt + said, len(prompt) + len(said) - len(z)) for prompt, said, z in right)
    torch.testing.assert_close(terms.terms["generation"].sum, generation)
    torch.testing.assert_close(terms.terms["revision"].sum, revision)
    counts = SDZeroRevision().counts(batch)
    assert {name: int(value) for name, value in counts.items()} == {
        "tokens": 15, "generation": 7 + 6, "revision": 3 + 1, "sequences": 4,
    }  # fmt: skip
    assert terms.metrics["revised"][0] == 2


@pytest.mark.parametrize("layout", ["padded", "padding_free"])
def test_conversations_of_the_data_are_parted_where_their_answers_are(layout):
    student = Bigram()
    ours = run(student, batch_of([EPISODES[0], EPISODES[3]], layout))
    data = run(student, batch_of([EPISODES[0], EPISODES[3]], layout, data=True))
    for name in ours.terms:
        torch.testing.assert_close(data.terms[name].sum, ours.terms[name].sum)
    assert not run(student, batch_of([EPISODES[2]], layout, data=True)).terms["generation"].sum


def test_episodes_without_a_right_revision_have_exactly_no_gradient():
    student = Bigram()
    terms = run(student, batch_of(EPISODES[1:3]))
    total = torch.stack([term.sum for term in terms.terms.values()]).sum()
    assert total == 0 and not torch.autograd.grad(total, student.table)[0].any()


def test_the_parts_of_a_split_batch_add_up():
    student = Bigram()
    whole, parts = run(student, batch_of(EPISODES)), [run(student, batch_of([one])) for one in EPISODES]
    for name, term in whole.terms.items():
        torch.testing.assert_close(sum(part.terms[name].sum for part in parts), term.sum)


def test_a_revision_needs_an_environment_that_asks_again(tmp_path):
    with pytest.raises(ValueError, match="environment: missing; SDZeroRevision learns from several turns"):
        trainer(tmp_path, SDZeroRevision())
    with pytest.raises(ValueError, match=r"rollouts\.environment: missing; sd_zero_revision"):
        check(load(RECIPES / "sd_zero" / "revise.yaml", ["rollouts.environment="]))


def test_losses_are_refused():
    with pytest.raises(ValueError, match="takes none"):
        SDZeroRevision([ReverseKL()])


def test_a_killed_first_phase_ends_as_an_unbroken_one(tmp_path):
    saves = {"save_strategy": "steps", "save_steps": 2, "environment": RETRY}
    whole = weights(trainer(tmp_path / "a", SDZeroRevision(), **saves))
    trainer(tmp_path / "b", SDZeroRevision(), **saves).train()
    made = trainer(tmp_path / "b", SDZeroRevision(), **saves)
    made.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-4"))
    assert all(torch.equal(p.detach(), whole[name]) for name, p in made.student.named_parameters())
    lines = [line for line in made.state.log_history if "revised" in line]
    assert any(line["revised"] > 0 for line in lines) and all(line["revised"] <= 1 for line in lines)
