"""Tasks for the tools of `tools.py`, with the calls that solve them.

| level | kind | what is asked | calls |
|---|---|---|---|
| 1 | `compute` | a sum, difference or product of two numbers | 2 |
| 2 | `keep` | store a number, and compute with it | 3 |
| 3 | `recall` | compute with a number that is in the store | 3 |
| 4 | `combine` | add or multiply two numbers of the store, and store the result | 5 |
| 5 | `chain` | the same, times a number, with the result under one of the two keys | 5 |
"""

import json
import random
import string
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from kdlm.sandbox.jsonl import write_jsonl
from kdlm.sandbox.progress import Progress
from kdlm.sandbox.tasks import LEVELS, Split, Task, generate
from kdlm.sandbox.tokenizer import EOS
from kdlm.sandbox.tools import World, value_of


@dataclass(frozen=True)
class ToolTask(Task):
    """One problem; `completion` is its last call.

    Attributes:
        calls: one a turn; the last one answers.
        store: what the store holds at the beginning, which the prompt does not say.
        goal: what it must hold at the end.
    """

    calls: list[str] = field(default_factory=list)
    store: dict[str, int] = field(default_factory=dict)
    goal: dict[str, int] = field(default_factory=dict)

    def world(self) -> World:
        """Return the tools as they are at the beginning."""
        return World(int(self.answer), self.goal, dict(self.store))

    def reference(self) -> str:
        """Return what `world_of` makes the same world of."""
        return json.dumps({"answer": int(self.answer), "goal": self.goal, "store": self.store})

    def talk(self) -> list[tuple[str, str]]:
        """Return each call and what the world says to it."""
        world = self.world()
        return [(call, world.call(call).text) for call in self.calls]


def world_of(reference: str) -> World:
    """Return the world that a row's column `task` describes. Raises ValueError where it describes none."""
    try:
        task = json.loads(reference)
        numbers = [{str(key): int(value) for key, value in task[name].items()} for name in ("goal", "store")]
        return World(int(task["answer"]), *numbers)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"no task of the tools: {reference!r:.80}, expected JSON with answer, goal and store"
        ) from error


def tool_tasks(*, seed: int, level: int, n: int, split: Split = "train") -> list[ToolTask]:
    """Return `n` different tasks of a level (1 to 5); see `tasks.generate`."""
    return generate(_problem, seed=seed, level=level, n=n, split=split)  # type: ignore[return-value]


def _problem(generator: random.Random, level: int) -> ToolTask:
    a, b, factor = (generator.randint(2, 99) for _ in range(3))
    first, second, third = generator.sample(string.ascii_lowercase, 3)
    sign = generator.choice("+-*")
    if level == 1:
        return _task(f"What is {a} {sign} {b}?", [], f"{a} {sign} {b}", {}, {}, level, "compute")
    if level == 2:
        asked = f"Store {a} as {first}. What is {first} {sign} {b}?"
        return _task(asked, [f"set {first} {a}"], f"{a} {sign} {b}", {}, {first: a}, level, "keep")
    if level == 3:
        asked = f"{first} is stored. What is {first} {sign} {b}?"
        return _task(asked, [f"get {first}"], f"{a} {sign} {b}", {first: a}, {}, level, "recall")
    read, store = [f"get {first}", f"get {second}"], {first: a, second: b}
    if level == 4:
        asked = f"{first} and {second} are stored. What is {first} {sign} {second}? Store it as {third}."
        return _task(asked, read, f"{a} {sign} {b}", store, {third: 0}, level, "combine")
    asked = f"{first} and {second} are stored. What is ({first} {sign} {second}) * {factor}? Store it as {first}."
    return _task(asked, read, f"({a} {sign} {b}) * {factor}", store, {first: 0}, level, "chain")


def _task(
    asked: str, calls: list[str], expression: str, store: dict[str, int], goal: dict[str, int], level: int, kind: str
) -> ToolTask:
    """Return the task; from level 4 on its goal is that the result is stored."""
    answer = value_of(expression)
    kept = dict.fromkeys(goal, answer) if level >= 4 else goal
    put = [f"set {key} {answer}" for key in kept] if level >= 4 else []
    last = f"answer: {answer}"
    calls = [*calls, f"calc: {expression}", *put, last]
    return ToolTask(f"{asked}\n", last, str(answer), level, kind, calls, store, kept)


@dataclass(frozen=True)
class ToolSet:
    """Tasks of every level, and how the training ones are solved.

    `train.jsonl` and `eval.jsonl`: `prompt` and `task`, for rollouts. `demonstrations.jsonl`: a row for each turn, the
    calls before it and what was said to them in its `prompt`, as plain text of the tokenizers whose end token is EOS.
    `conversations.jsonl`: a row for each task, as `messages`, for any chat template.
    """

    train: int
    eval: int
    seed: int
    needs: tuple[str, ...] = ()

    def ingredients(self) -> dict[str, Any]:
        return asdict(self)

    def make(self, folder: Path, built: dict[str, Path], progress: Progress, name: str) -> dict[str, Any]:
        counts: dict[Split, int] = {"train": self.train, "eval": self.eval}
        tasks = {
            split: [task for level in LEVELS for task in tool_tasks(seed=self.seed, level=level, n=n, split=split)]
            for split, n in counts.items()
        }
        for split, rows in tasks.items():
            write_jsonl(folder / f"{split}.jsonl", map(_row, rows))
        turns = [turn for task in tasks["train"] for turn in demonstration(task)]
        write_jsonl(folder / "demonstrations.jsonl", turns)
        write_jsonl(folder / "conversations.jsonl", ({"messages": conversation(task)} for task in tasks["train"]))
        return {**{split: len(rows) for split, rows in tasks.items()}, "demonstrations": len(turns)}


def _row(task: ToolTask) -> dict[str, Any]:
    return {"prompt": task.prompt, "task": task.reference(), "level": task.level, "kind": task.kind}


def demonstration(task: ToolTask) -> Iterator[dict[str, str]]:
    """Yield the turns of the solution: what the student has before it, and its call."""
    before = task.prompt
    for call, reply in task.talk():
        yield {"prompt": before, "completion": call}
        before += f"{call}{EOS}\n{reply}\n"  # as kdlm.data.turns writes plain text


def conversation(task: ToolTask) -> list[dict[str, str]]:
    """Return the solution as messages, without what is said to the answer."""
    messages = [{"role": "user", "content": task.prompt.strip()}]
    for call, reply in task.talk():
        messages += [{"role": "assistant", "content": call}, {"role": "tool", "content": reply}]
    return messages[:-1]
