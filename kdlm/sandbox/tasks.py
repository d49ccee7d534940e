"""Tasks with a worked solution and an answer that can be checked exactly.

A family of tasks (`arithmetic`, `strings`) is a function that makes one problem of a level from a random generator.
Everything here is a pure function of its arguments: the same seed gives the same tasks on every machine.
"""

import hashlib
import random
import re
import string
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Split = Literal["train", "eval"]
LEVELS = (1, 2, 3, 4, 5)
EVAL_SHARE = 8  # one problem in eight belongs to eval


@dataclass(frozen=True)
class Task:
    """One problem.

    Attributes:
        prompt: the question.
        completion: chain of thought that ends with the line `Answer: <answer>`, or the answer alone.
        answer: what the last line must say.
        level: difficulty, 1 to 5.
        kind: the operation, such as `add` or `reverse`.
    """

    prompt: str
    completion: str
    answer: str
    level: int
    kind: str


Family = Callable[[random.Random, int], Task]


def solved(prompt: str, steps: list[str], answer: str, level: int, kind: str) -> Task:
    """Return the Task whose completion is the steps, one a line, and the answer."""
    return Task(prompt, "\n".join([*steps, f"Answer: {answer}"]), answer, level, kind)


def generate(family: Family, *, seed: int, level: int, n: int, split: Split = "train") -> list[Task]:
    """Return `n` different tasks of a level.

    The digest of the prompt decides whether a problem belongs to train or to eval, so that no seed, level or number
    makes the two meet. Raises ValueError for an unknown level, and when a level has fewer than `n` problems to give.
    """
    if level not in LEVELS:
        raise ValueError(f"level {level} does not exist, levels are {LEVELS[0]} to {LEVELS[-1]}")
    generator = random.Random(f"{seed} {level}")
    tasks: dict[str, Task] = {}
    for _ in range(100 * n + 1_000):
        if len(tasks) == n:
            return list(tasks.values())
        task = family(generator, level)
        if _split_of(task.prompt) == split:
            tasks.setdefault(task.prompt, task)
    raise ValueError(f"level {level} gave {len(tasks)} different {split} problems, {n} were asked for")


def _split_of(prompt: str) -> Split:
    return "eval" if hashlib.sha256(prompt.encode()).digest()[0] % EVAL_SHARE == 0 else "train"


_ANSWER = re.compile(r"(?:final\s+)?answer\s*(?:is\b|[:=])\s*:?(?P<rest>[^\n]*)", re.IGNORECASE)
_GSM8K = re.compile(r"^####\s*(?P<rest>[-+\u2212$]*[0-9][^\n]*)", re.MULTILINE)  # a number: else it is a heading
_BRACE = re.compile(r"\\[{}]|\\boxed\{|[{}]")
_SPECIAL = re.compile(r"<\|?\w+\|?>|</s>")
_INTEGER = re.compile(r"([-+]?)([0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)")
_MARKS = string.whitespace + "\u00a0\u2009\u202f*$`\"'"


def marked_answer(text: str) -> str | None:
    r"""Return the rest of the last `Answer: ...` line or of the last `#### ...` line (GSM8K), or what is in the last
    `\boxed{...}`, whichever starts last. None where there is none of them.
    """
    text = _SPECIAL.sub("\n", text)
    found = [(match.start(), match["rest"]) for form in (_ANSWER, _GSM8K) for match in form.finditer(text)]
    if (boxed := _last_boxed(text)) is not None:
        found.append(boxed)
    return _bare(max(found)[1]) if found else None


def final_answer(text: str) -> str | None:
    """Return what a text gives as its answer: the marked one, or the whole text when it is one line without any.
    None when it gives none: an unfinished chain of thought has no answer, whatever number it stopped at.
    """
    if (marked := marked_answer(text)) is not None:
        return marked
    text = _SPECIAL.sub("\n", text).strip()
    return _bare(text) if text and "\n" not in text else None


def verify(task: Task, text: str) -> bool:
    """Say whether the text's final answer is the task's; see `gives`."""
    return gives(text, task.answer)


def gives(text: str, answer: str) -> bool:
    """Say whether the text's final answer is this one: integers by value, strings letter by letter.

    Two answers on the line (`734 or 735`) are none. The last `Answer:` counts, so guessing one after another does
    not help.
    """
    given = final_answer(text)
    if given is None:
        return False
    expected = _integer(answer)
    return given == answer if expected is None else _integer(given) == expected


def _last_boxed(text: str) -> tuple[int, str] | None:
    r"""Where the last closed `\boxed{...}` starts, and what is in it; braces in it are matched, in one pass."""
    opened: list[tuple[int, int] | None] = []
    last = None
    for brace in _BRACE.finditer(text):
        if brace[0] in (r"\{", r"\}"):
            continue
        if brace[0] != "}":
            opened.append(brace.span() if brace[0] != "{" else None)
        elif opened and (span := opened.pop()) is not None and (last is None or span[0] > last[0]):
            last = (span[0], text[span[1] : brace.start()])
    return last


def _integer(text: str) -> str | None:
    """The plain form of an integer, None for other text. Not `int`, which refuses the endless numbers models write."""
    match = _INTEGER.fullmatch(text)
    if match is None:
        return None
    digits = match[2].replace(",", "").lstrip("0") or "0"
    return f"-{digits}" if match[1] == "-" and digits != "0" else digits


def _bare(answer: str) -> str:
    """Without the marks that people and models put around an answer: quotes, bold, dollar signs, a full stop."""
    return answer.lstrip(_MARKS).rstrip(_MARKS + ".").replace("\u2212", "-")  # the typographic minus
