"""Walks: the target task of a small world for self-distillation.

A prompt such as `2HCBGH=` is a place, 0 to 9, and five moves; the completion `78416` is where they lead, one after
another. A move is a fixed permutation of the places; A to G are `KNOWN` and H to J `NEW`. The reference solution is in
another hand, which writes letters for the places: `hiebg`. A walk is right when every place of it is, in either hand.

| level | moves |
|---|---|
| 1 | known ones |
| 2 | all ten |
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

from kdlm.sandbox.tasks import Split, Task, generate

PLACES, LETTERS = "0123456789", "abcdefghij"
KNOWN, NEW = "ABCDEFG", "HIJ"
STEPS = 5
IN_LETTERS, IN_DIGITS = str.maketrans(PLACES, LETTERS), str.maketrans(LETTERS, PLACES)
MOVES = {move: "".join(random.Random(f"move {move}").sample(PLACES, len(PLACES))) for move in KNOWN + NEW}
"""Where each move leads from the places 0 to 9."""


@dataclass(frozen=True)
class Walk(Task):
    """A task with its `solution`, which only a teacher is shown."""

    solution: str


def walks(*, seed: int, level: int, n: int, split: Split = "train") -> list[Walk]:
    """Return `n` different walks of a level, 1 or 2; see `tasks.generate`."""

    def problem(generator: random.Random, level: int) -> Walk:
        start = generator.choice(PLACES)
        moves = "".join(generator.choices(KNOWN if level == 1 else KNOWN + NEW, k=STEPS))
        answer = walk(start, moves)
        return Walk(f"{start}{moves}=", answer, answer, level, "walk", answer.translate(IN_LETTERS))

    if level not in (1, 2):
        raise ValueError(f"level {level} does not exist, levels are 1 and 2")
    return [task for task in generate(problem, seed=seed, level=level, n=n, split=split) if isinstance(task, Walk)]


def step(place: str, move: str) -> str:
    """Return where a move leads from a place."""
    return MOVES[move][int(place)]


def walk(start: str, moves: str, lead: Callable[[str, str], str] = step) -> str:
    """Return the places that moves lead to, one after another, by `lead(place, move)`."""
    places = [start]
    for move in moves:
        places.append(lead(places[-1], move))
    return "".join(places[1:])


def right(answer: str, attempt: str) -> bool:
    """Say whether an attempt is the walk `answer`, in digits or in letters."""
    return attempt.strip().translate(IN_DIGITS) == answer


def feedback(answer: str, attempt: str) -> str:
    """Return what a judge says of a wrong attempt: how the walk begins, to the first wrong place, but never to its end.

    Where `78416` is right, `No, 784..` is said of `78012`, and `No, 7841.` of `78412`. What is no walk at all gets
    `No, .....`. Raises ValueError where the attempt is right.
    """
    if right(answer, attempt):
        raise ValueError(f"{attempt!r} is right, there is nothing to say")
    given = attempt.strip().translate(IN_DIGITS)
    known = ""
    if len(given) == len(answer) and set(given) <= set(PLACES):
        wrong = next(number for number, place in enumerate(answer) if given[number] != place)
        known = answer[: min(wrong + 1, len(answer) - 1)]
    return "No, " + known.ljust(len(answer), ".")
