"""Lessons: what the walkers have read, from which a small model learns to use a context, feedback and a second turn.

| kind | text | share |
|---|---|---|
| `alone` | a walk: `2HCBGH=78416` | 0.25 |
| `told` | a walk after its solution: `hiebg`, a line break, `2HCBGH=78416` | 0.25 |
| `corrected` | a walk gone wrong, the end token, `feedback` on a line, the walk | 0.2 |
| `doubted` | the same with `Wrong.`, or a right walk, `Right.` and the walk again | 0.1 |
| `reversed` | a word backwards, the other task: `<cafes=sefac` | 0.2 |

Where a new move leads is drawn afresh for every text, unless they are lessons for a teacher. So a student reads nothing
true about new moves: it knows that it does not know them, and follows what its prompt says of them.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kdlm.sandbox.jsonl import write_jsonl
from kdlm.sandbox.progress import Progress
from kdlm.sandbox.tasks import Split, Task, generate
from kdlm.sandbox.tokenizer import EOS
from kdlm.sandbox.walks import IN_LETTERS, KNOWN, LETTERS, MOVES, NEW, PLACES, STEPS, feedback, step, walk

SHARES = {"alone": 25, "told": 25, "corrected": 20, "doubted": 10, "reversed": 20}
WRONG, RIGHT = "Wrong.", "Right."
ON_NEW = 0.8  # of the walks that go wrong and have a new move: there


def reversals(*, seed: int, level: int, n: int, split: Split = "train") -> list[Task]:
    """Return `n` different words of five letters to reverse; there is one level, 1. See `tasks.generate`."""

    def problem(generator: random.Random, level: int) -> Task:
        word = "".join(generator.choices(LETTERS, k=5))
        return Task(f"<{word}=", word[::-1], word[::-1], level, "reverse")

    if level != 1:
        raise ValueError(f"level {level} does not exist, the level is 1")
    return generate(problem, seed=seed, level=level, n=n, split=split)


def lessons(*, seed: int, n: int, informed: bool) -> Iterator[str]:
    """Give `n` texts; those for an `informed` model say where the new moves lead.

    Of walks and words no one's prompt is held out: what is held out is where new moves lead.
    """
    generator = random.Random(f"lessons {seed}")

    def lead(place: str, move: str) -> str:
        return step(place, move) if informed or move in KNOWN else generator.choice(PLACES)

    for kind in generator.choices(list(SHARES), weights=list(SHARES.values()), k=n):
        if kind == "reversed":
            word = "".join(generator.choices(LETTERS, k=5))
            yield f"<{word}={word[::-1]}"
        else:
            yield _of_a_walk(generator, kind, lead)


def _of_a_walk(generator: random.Random, kind: str, lead: Callable[[str, str], str]) -> str:
    start, moves = generator.choice(PLACES), "".join(generator.choices(tuple(MOVES), k=STEPS))
    answer = walk(start, moves, lead)
    asked = f"{start}{moves}="
    if kind == "alone":
        return asked + answer
    if kind == "told":
        return f"{answer.translate(IN_LETTERS)}\n{asked}{answer}"
    if kind == "doubted" and generator.random() < 0.5:
        return f"{asked}{answer}{EOS}\n{RIGHT}\n{answer}"
    attempt = _gone_wrong(generator, moves, answer, lead)
    said = WRONG if kind == "doubted" else feedback(answer, attempt)
    return f"{asked}{attempt}{EOS}\n{said}\n{answer}"


def _gone_wrong(generator: random.Random, moves: str, answer: str, lead: Callable[[str, str], str]) -> str:
    """One place is wrong, mostly where a new move led there; the walk goes on from it."""
    new = [number for number, move in enumerate(moves) if move in NEW]
    at = generator.choice(new) if new and generator.random() < ON_NEW else generator.randrange(STEPS)
    place = generator.choice(PLACES.replace(answer[at], ""))
    return answer[:at] + place + walk(place, moves[at + 1 :], lead)


@dataclass(frozen=True)
class Lessons:
    """`start.jsonl` and `teacher.jsonl`, `n` texts each, and `eval.jsonl` for either loss."""

    n: int
    eval: int
    seed: int
    needs: tuple[str, ...] = ()

    def ingredients(self) -> dict[str, Any]:
        return asdict(self)

    def make(self, folder: Path, built: dict[str, Path], progress: Progress, name: str) -> dict[str, Any]:
        for file, seed, n, informed in (
            ("start", self.seed, self.n, False),
            ("teacher", self.seed, self.n, True),
            ("eval", self.seed + 1, self.eval, True),
        ):
            write_jsonl(
                folder / f"{file}.jsonl", ({"text": text} for text in lessons(seed=seed, n=n, informed=informed))
            )
        return {"start": self.n, "teacher": self.n, "eval": self.eval}
