"""Rounds: which text an optimiser step trains on, how old it is, and what survives a checkpoint."""

import json
import threading
from dataclasses import replace
from typing import Any

import pytest
from torch.utils.data import SequentialSampler

from kdlm.rollouts import Completion, Opaque, Repeated, RolloutSection, Rounds, Sampling, Written, prompt_of


class Scripted:
    """Completes a prompt with its first token and the version of its weights."""

    def __init__(self, lives: bool = False):
        self.lives, self.version, self.calls = lives, -1, 0
        self.gate: threading.Event | None = None

    def take(self, student: Any, version: int) -> None:
        self.version = version

    def generate(self, prompts: Any, sampling: Sampling, seed: int) -> list[Completion]:
        self.calls += 1
        version = self.version
        return [
            Completion([prompt[0], version], [0.0, 0.0], "end", place, version)
            for place, prompt in enumerate(prompts)
            for _ in range(sampling.samples_per_prompt)
        ]

    def close(self) -> None:
        pass


def loader(steps: int, micro: int = 1, size: int = 2, times: int = 1, every: int = 1) -> Any:
    """Batches of rows whose first token is their number; runs of `every` steps repeated as `Repeated` does."""
    rows = [
        {"input_ids": [n, 1, 2], "labels": [-100, -100, 2], "index": n} for n in range(steps * micro * size // times)
    ]
    order = list(Repeated(SequentialSampler(rows), every * micro * size, times)) if times > 1 else range(len(rows))
    return iter([Opaque([rows[i] for i in list(order)[at : at + size]]) for at in range(0, len(order), size)])


def rounds(engine: Any, last: int = 10, text: Any = lambda index: "student", **options: Any) -> Rounds:
    def finish(drawn: Any) -> list[Written]:
        return [Written(*one, str(one[2].ids)) for one in drawn]

    section = RolloutSection(**options)
    return Rounds(engine, section, seed=0, text=text, student=lambda: None, finish=finish, last=lambda: last)


def run(made: Rounds, batches: Any, steps: range, micro: int = 1) -> list[Any]:
    return [made.step(batches, micro, index) for index in steps]


@pytest.mark.parametrize("every", [1, 2, 3])
@pytest.mark.parametrize("reuse", [1, 2])
@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("micro", [1, 2])
def test_text_is_never_older_than_the_section_says_and_fits_its_prompt(every, reuse, asynchronous, micro) -> None:
    options = {"every": every, "reuse": reuse, "asynchronous": asynchronous}
    steps = 2 * every * reuse + every * reuse
    made = rounds(Scripted(), last=steps, **options)
    ages = []
    for index, slot in enumerate(run(made, loader(steps, micro, times=reuse, every=every), range(steps), micro)):
        assert len(slot.micro) == len(slot.written) == micro
        for rows, written in zip(slot.micro, slot.written, strict=True):
            assert [one.completion.ids[0] for one in written] == [row["index"] for row in rows]
            ages += [index - one.completion.version for one in written]
    assert max(ages) == made.section.staleness
    assert min(ages) >= 0
    made.close()


def test_every_row_is_trained_on_as_often_as_reuse_says() -> None:
    made = rounds(Scripted(), last=12, every=2, reuse=3)
    slots = run(made, loader(12, times=3, every=2), range(12))
    seen = [row["index"] for slot in slots for rows in slot.micro for row in rows]
    assert seen == [0, 1, 2, 3] * 3 + [4, 5, 6, 7] * 3


def test_samples_of_a_prompt_stay_together() -> None:
    made = rounds(Scripted(), sampling={"samples_per_prompt": 3})
    slot = run(made, loader(1), range(1))[0]
    assert [one.completion.ids[0] for one in slot.written[0]] == [0, 0, 0, 1, 1, 1]


def test_steps_on_given_text_ask_the_engine_nothing() -> None:
    engine = Scripted()
    made = rounds(engine, text=lambda index: "data" if index % 2 else "student", every=2)
    slots = run(made, loader(4), range(4))
    assert [slot.text for slot in slots] == ["student", "data", "student", "data"]
    assert [len(slot.written) for slot in slots] == [1, 0, 1, 0]
    engine.calls = 0
    run(rounds(engine, text=lambda index: "data"), loader(4), range(4))
    assert engine.calls == 0


def test_the_loader_ends_and_begins_again() -> None:
    made = rounds(Scripted(), last=20, every=3, asynchronous=True)
    for epoch in range(2):
        batches = loader(4)
        slots = run(made, batches, range(4 * epoch, 4 * epoch + 4))
        assert [row["index"] for slot in slots for rows in slot.micro for row in rows] == list(range(8))
        assert made.step(batches, 1, 4 * epoch + 4) is None


def test_nothing_is_completed_that_no_step_will_use() -> None:
    engine = Scripted()
    made = rounds(engine, last=4, every=2, asynchronous=True)
    run(made, loader(10), range(4))
    made.close()
    assert engine.calls == 2


@pytest.mark.parametrize("stop", range(1, 8))
@pytest.mark.parametrize("options", [{"every": 3}, {"every": 2, "reuse": 2}, {"every": 2, "asynchronous": True}])
def test_a_run_that_was_stopped_trains_on_what_the_unbroken_one_does(stop: int, options: dict[str, Any]) -> None:
    times, every = options.get("reuse", 1), options["every"]
    whole = run(rounds(Scripted(), last=12, **options), loader(12, times=times, every=every), range(12))
    first = rounds(Scripted(), last=12, **options)
    begun = run(first, loader(12, times=times, every=every), range(stop))
    resumed = rounds(Scripted(), last=12, **options)
    resumed.load_state(json.loads(json.dumps(first.state())))
    batches = loader(12, times=times, every=every)
    for _ in range(stop):  # what the Trainer skips
        next(batches)
    assert begun + run(resumed, batches, range(stop, 12)) == whole


def test_an_engine_on_live_weights_cannot_run_beside_training() -> None:
    with pytest.raises(ValueError, match="asynchronous"):
        rounds(Scripted(lives=True), asynchronous=True)


def test_what_the_engine_raises_comes_out_of_the_step() -> None:
    class Broken(Scripted):
        def generate(self, *_: Any) -> Any:
            raise ConnectionError("away")

    with pytest.raises(ConnectionError, match="away"):
        run(rounds(Broken()), loader(1), range(1))


def test_completions_that_fail_are_made_anew_by_the_run_that_goes_on() -> None:
    class Once(Scripted):
        def generate(self, *asked: Any) -> list[Completion]:
            if self.calls == 2:
                raise ConnectionError("away")
            return super().generate(*asked)

    options = {"every": 2, "asynchronous": True}
    first = rounds(Once(), last=12, **options)
    begun = run(first, loader(12), range(4))
    with pytest.raises(ConnectionError, match="away"):
        first.step(first._source, 1, 4)
    state = json.loads(json.dumps(first.state()))
    assert state == {"steps": [], "next": None}
    resumed, batches = rounds(Scripted(), last=12, **options), loader(12)
    resumed.load_state(state)
    for _ in range(4):  # what the Trainer skips
        next(batches)
    after = run(resumed, batches, range(4, 12))
    rows = [row["index"] for slot in [*begun, *after] for micro in slot.micro for row in micro]
    assert rows == list(range(24))


# prompts


@pytest.mark.parametrize(
    ("labels", "prompt"),
    [
        ([-100, -100, 7, 8], 2),
        ([-100, -100, 7, -100, 9, 10], 4),
        ([-100, -100, -100], 3),
        ([-100, -100, 7, 8, -100], 2),
    ],
)
def test_a_prompt_is_what_stands_before_the_last_answer(labels: list[int], prompt: int) -> None:
    row = {"input_ids": list(range(5, 5 + len(labels))), "labels": labels}
    assert prompt_of(row, None) == row["input_ids"][:prompt]


def test_plain_text_lends_its_first_tokens() -> None:
    row = {"input_ids": [5, 6, 7, 8], "labels": [-100, 6, 7, 8]}
    assert prompt_of(row, 3) == [5, 6, 7]
    assert prompt_of(row, 9) == [5, 6, 7]
    with pytest.raises(ValueError, match=r"rollouts\.prompt_tokens"):
        prompt_of(row, None)


def test_too_few_rows_for_a_round_are_refused() -> None:
    with pytest.raises(ValueError, match="one round takes 8 rows and the training data hold 5"):
        Repeated(SequentialSampler(range(5)), 8, 2)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_what_a_teacher_is_told_is_asked_when_a_round_begins_and_neither_drawing_nor_saving_asks_it(
    asynchronous: bool,
) -> None:
    made = rounds(Scripted(), last=8, every=2, asynchronous=asynchronous)
    events: list[str] = []

    def told(written: list[Written]) -> list[Written]:
        events.append(f"told {len(written)}")
        return [replace(one, context="c") for one in written]

    made.told, made.trained_on = told, lambda written: events.append(f"on {[one.context for one in written]}")
    batches = loader(8)
    for index in range(4):
        slot = made.step(batches, 1, index)
        assert slot is not None and all(one.context == "c" for rows in slot.written for one in rows)
        made.state()
    assert events == ["told 4", f"on {['c'] * 4}"] * 2
    made.complete([{"input_ids": [1, 2, 3], "labels": [-100, -100, 3]}], 9)
    assert events[4:] == ["told 1"]  # for evaluation the teacher is told, and nothing is trained on
    made.close()
