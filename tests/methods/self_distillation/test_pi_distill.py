"""pi-Distill: both readings of what an informed student wrote, each by its own objective, the other held fixed."""

from typing import Any, cast

import pytest
import torch
from episodes_by_hand import Reader, gradient, run
from self_attempts import even, trainer, weights

from kdlm.data import Collator, ContextCollator
from kdlm.losses import ReverseKL
from kdlm.methods import PiDistill, RewardMethod
from kdlm.rollouts import Completion, Written, as_row, describe
from kdlm.signal import IGNORE_INDEX
from kdlm.teachers import SelfTeacher

LAYOUTS = pytest.mark.parametrize("layout", ["padded", "padding_free"])
TEXTS = [  # prompt, its number, prompt with the context, completion, reward
    ([1, 2], 0, [3, 4, 5, 1, 2], [7, 8, 9], 1.0),
    ([1, 2], 0, [3, 4, 5, 1, 2], [6], 0.0),
    ([9], 1, None, [3, 4], 0.0),
    ([9], 1, None, [2, 2, 5], 1.0),
]
ADVANTAGES = [0.5, -0.5, -0.5, 0.5]
CAP = 2.0


def batch_of(texts: list[Any], layout: str, writer: Reader, *, told: bool = True) -> dict[str, Any]:
    written = []
    for x, index, informed, y, reward in texts:
        read = informed if told and informed else x
        logs = writer.logs(read, y).detach()[torch.arange(len(y)), y].tolist()
        row = {"input_ids": x, "labels": [IGNORE_INDEX] * len(x), "index": index, "asked": "{}"}
        prompt = informed if told else None
        written.append(Written(row, x, Completion(y, logs, "end", index, 0), "", reward, context_prompt=prompt))
    rows = [as_row(one, masked=False) for one in written]
    collator = ContextCollator(Collator(0, layout=layout), cast("Any", None))  # type: ignore[arg-type]
    batch: dict[str, Any] = collator(rows)
    return batch | describe(batch, rows, written)


def by_hand(student: Reader, texts: list[Any], *, share: float, kl: float) -> torch.Tensor:
    """Return the loss whose gradient the method's is, written down token by token."""
    total = torch.zeros((), dtype=torch.float64)
    for (x, _, informed, y, _), advantage in zip(texts, ADVANTAGES, strict=True):
        told, alone = student.logs(informed or x, y), student.logs(x, y)
        at = (torch.arange(len(y)), y)
        ratio = (alone - told).detach()[at].exp().clamp(max=CAP)
        to_student = (told.exp() * (told - alone.detach())).sum()
        to_teacher = (told.exp() * (told - alone)).detach() - alone * told.detach().exp()
        to_teacher = to_teacher.sum() + (alone * told.exp()).detach().sum()
        total = total + share * (-advantage * told[at].sum() + kl * to_student)
        total = total + (1 - share) * (-(ratio * advantage * alone[at]).sum() + kl * to_teacher)
    return total


@LAYOUTS
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("kl", [0.0, 0.2])
def test_the_objective_is_the_one_written_down(layout: str, share: float, kl: float) -> None:
    student = Reader()
    terms = run(PiDistill(share=share, kl=kl, importance_cap=CAP), student, batch_of(TEXTS, layout, student))
    expected = gradient(by_hand(student, TEXTS, share=share, kl=kl), student)
    torch.testing.assert_close(gradient(terms, student), expected, rtol=1e-6, atol=1e-7)
    assert terms.terms.keys() == {"teacher", "student"} and expected.abs().max() > 0.01


def test_the_teachers_objective_has_no_gradient_through_the_prompt_without_the_context_nor_the_students_with() -> None:
    student = Reader()
    batch = batch_of(TEXTS[:2], "padded", student)
    rows = {}
    for name, share in (("teacher", 1.0), ("student", 0.0)):
        found = gradient(run(PiDistill(share=share, kl=0.2), student, batch), student)
        rows[name] = set(found.abs().sum(1).nonzero()[:, 0].tolist())
    read = {
        "teacher": [informed + y for _, _, informed, y, _ in TEXTS[:2]],
        "student": [x + y for x, _, _, y, _ in TEXTS[:2]],
    }
    for name, texts in read.items():
        states = {
            state
            for ids in texts
            for state in student.states({"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids))})[
                0
            ].tolist()
        }
        assert rows[name] and rows[name] <= states
    assert not rows["teacher"] & rows["student"]


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_without_information_it_is_the_plain_policy_gradient(share: float) -> None:
    student = Reader()
    batch = batch_of(TEXTS, "padded", student, told=False)
    assert "theirs" not in batch
    ours = gradient(run(PiDistill(share=share, kl=0.7), student, batch), student)
    plain = gradient(run(RewardMethod(), student, batch), student)
    torch.testing.assert_close(ours, plain, rtol=0, atol=1e-9)


def test_the_ratio_of_what_only_the_informed_would_write_is_cut_and_that_is_logged() -> None:
    student = Reader()
    metrics = run(PiDistill(importance_cap=1.01), student, batch_of(TEXTS, "padded", student)).metrics
    told, alone = (
        torch.cat([student.logs(p, y)[torch.arange(len(y)), y] for p, y in pairs])
        for pairs in ([(i or x, y) for x, _, i, y, _ in TEXTS], [(x, y) for x, _, _, y, _ in TEXTS])
    )
    assert metrics["student_weights_cut"][0] == (alone - told > 0.01).sum() > 0
    torch.testing.assert_close(
        metrics["student_log_weight"][0], (alone - told).abs().sum().detach(), rtol=1e-5, atol=1e-6
    )
    assert metrics["teacher_log_weight"][0] < 1e-5 and metrics["informed"][0] == 2


@LAYOUTS
def test_the_parts_of_a_batch_add_up(layout: str) -> None:
    student, method = Reader(), PiDistill()
    whole = run(method, student, batch_of(TEXTS, "padded", student))
    parts = [run(method, student, batch_of(part, layout, student)) for part in (TEXTS[:2], TEXTS[2:])]
    torch.testing.assert_close(sum(gradient(part, student) for part in parts), gradient(whole, student))
    for name, (value, _) in whole.metrics.items():
        torch.testing.assert_close(sum(part.metrics[name][0] for part in parts), value)


def test_rewards_beside_a_kl_to_the_informed_self_are_the_sum_of_the_two(tmp_path) -> None:
    """OPSD with rewards: `policy_gradient` with reverse KL to a self teacher that is told more."""
    student, teacher = Reader(), Reader(5)
    batch = batch_of(TEXTS, "padded", student)
    both = gradient(run(RewardMethod([ReverseKL(weight=0.3)]), student, batch, teacher), student)
    alone = gradient(run(RewardMethod(), student, batch), student)
    expected = torch.zeros((), dtype=torch.float64)
    for x, _, _, y, _ in TEXTS:
        q, p = student.logs(x, y), teacher.logs(x, y).detach()
        expected = expected + 0.3 * (q.exp() * (q - p)).sum()
    torch.testing.assert_close(both, alone + gradient(expected, student), rtol=1e-6, atol=1e-7)
    made = trainer(tmp_path, RewardMethod([ReverseKL()]), SelfTeacher("current"), samples=2, columns=hints, max_steps=1)
    weights(made)
    assert made.state.log_history[0]["reverse_kl"] > 0


def hints(number: int) -> dict[str, str]:
    return {"context": f"hint {number}" if number != 2 else ""}


def informed(tmp_path: Any, method: Any, **options: Any) -> Any:
    return trainer(tmp_path, method, samples=4, columns=hints, rollouts={"informed": True}, **options)


def watched(made: Any) -> tuple[list[list[list[int]]], dict[str, Any]]:
    """Train a step, and return what the engine was asked, call by call, and the batch."""
    asked, batches, losses = [], [], made.method.losses
    generate = made.rounds.engine.generate
    made.rounds.engine.generate = lambda prompts, *rest: asked.append(prompts) or generate(prompts, *rest)
    made.method.losses = lambda nets, batch, *rest: batches.append(batch) or losses(nets, batch, *rest)
    weights(made)
    return asked, batches[0]


def prompts_of(made: Any, batch: dict[str, Any]) -> tuple[list[list[int]], list[list[int]]]:
    """Return the prompts of a batch, as they are and with their contexts."""
    rows = {row["index"]: row for row in made.train_dataset}
    rows = [rows[number] for number in batch["index"][::4].tolist()]
    reprompt, plain = made.data_collator.reprompt, [row["input_ids"] for row in rows]
    return plain, [reprompt(row["asked"], row["context"]) if row["context"] else row["input_ids"] for row in rows]


@LAYOUTS
def test_the_engine_reads_the_context_and_the_row_is_trained_on_without(tmp_path, layout: str) -> None:
    made = informed(tmp_path, PiDistill(), layout=layout, max_steps=1)
    made.rounds.engine = made.rounds.engine.engine
    (asked,), batch = watched(made)
    plain, told = prompts_of(made, batch)
    assert asked == told and told != plain
    assert batch["informed"].tolist() == [
        one != other for one, other in zip(plain, told, strict=True) for _ in range(4)
    ]
    starts = batch["sequence"].flatten().diff(prepend=torch.tensor([-1])).nonzero()[:, 0].tolist()
    if layout == "padding_free":
        found = [batch["input_ids"][0, start : start + 4].tolist() for start in starts]
        assert found == [prompt for prompt in plain for _ in range(4)]
    line = made.state.log_history[0]
    assert line["teacher_log_weight"] < 1e-5 and line["student_log_weight"] > 1e-3


def test_episodes_are_told_too_and_evaluation_is_not(tmp_path) -> None:
    retry = {"name": "retry", "turns": 2, "until_right": False, "ask": "Again."}
    made = informed(tmp_path, PiDistill(), environment=retry, max_steps=1)
    (first, second), batch = watched(made)
    plain, told = prompts_of(made, batch)
    assert first == told and all(any(ids[: len(one)] == one for one in told) for ids in second)
    assert [ids[:4] for ids in batch["input_ids"].tolist()] == [one for one in plain for _ in range(4)]
    assert batch["turn"].max() == 1 and (batch["turn"][:, 4] == 0).all()
    made = informed(tmp_path, PiDistill())
    (one,) = made.rounds.complete([made.train_dataset[0]], 0, samples=1)
    made.rounds.informed = None
    (plainly,) = made.rounds.complete([made.train_dataset[0]], 0, samples=1)
    assert one == plainly and one.prompt == made.train_dataset[0]["input_ids"]
    made.close()


def test_neither_the_cut_into_micro_batches_nor_the_layout_shows(tmp_path) -> None:
    options = {"max_steps": 2, "optim": "sgd"}
    whole = weights(informed(tmp_path / "a", PiDistill(), **options))
    cut = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}
    parts = weights(informed(tmp_path / "b", PiDistill(), layout="padding_free", **cut, **options))
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-6, atol=1e-7)


def test_a_run_that_is_killed_ends_as_an_unbroken_one(tmp_path) -> None:
    saves = {"save_strategy": "steps", "save_steps": 2}
    whole = weights(informed(tmp_path / "a", PiDistill(), **saves))
    informed(tmp_path / "b", PiDistill(), **saves).train()
    made = informed(tmp_path / "b", PiDistill(), **saves)
    made.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-4"))
    assert all(torch.equal(p.detach(), whole[name]) for name, p in made.student.named_parameters())


def test_a_student_that_is_not_told_more_is_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"rollouts\.informed"):
        trainer(tmp_path, PiDistill(), reward=even)
    with pytest.raises(ValueError, match="takes none"):
        PiDistill([ReverseKL()])
