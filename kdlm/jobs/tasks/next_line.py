"""`kdlm_code_next`: which of four lines goes on with a file of the standard library that no sandbox model has read?

The three others are that line with two of its words exchanged. So all four have the same length and the same words,
and what is left to tell them apart is what the line says, after the lines before it. (With lines taken from elsewhere a
sandbox teacher does no better than chance: which line is likely is then mostly a matter of its length.)
"""

import random
from itertools import combinations
from typing import Any

from datasets import Dataset

from kdlm.sandbox import build
from kdlm.sandbox.jsonl import read_jsonl

QUESTIONS = 400
CONTEXT = 400  # characters at most, in whole lines
WORDS = 4  # of a line, at least: three words can be exchanged in three ways only
CHOICES = 4


def documents(**_: Any) -> dict[str, Dataset]:
    """Return the questions: `path`, `line` (from 1), `context`, four `choices` and which is true, `gold`."""
    return {"test": Dataset.from_list(questions(read_jsonl(build("code") / "eval.jsonl"), n=QUESTIONS, seed=0))}


def questions(files: list[dict[str, str]], *, n: int, seed: int) -> list[dict[str, Any]]:
    """Return up to `n` questions on lines drawn from files with `path` and `text`; the same ones for the same seed."""
    generator = random.Random(seed)
    texts = {file["path"]: file["text"].split("\n") for file in files}
    places = [(path, i) for path, lines in texts.items() for i in range(len(lines))]
    generator.shuffle(places)
    made = []
    for path, i in places:
        lines = texts[path]
        context = _context(lines[:i])
        if context.strip() and (choices := _choices(lines[i].rstrip(), generator)):
            true = choices[0]
            generator.shuffle(choices)
            made.append(
                {"path": path, "line": i + 1, "context": context, "choices": choices, "gold": choices.index(true)}
            )
        if len(made) == n:
            break
    return made


def _choices(line: str, generator: random.Random) -> list[str] | None:
    """The line, and the line with two of its words exchanged in different ways; None for a line of few words."""
    words = line.split(" ")
    places = [place for place, word in enumerate(words) if word]
    if len(places) < WORDS:
        return None
    pairs = list(combinations(places, 2))
    generator.shuffle(pairs)
    found = [line]
    for one, other in pairs:
        swapped = words.copy()
        swapped[one], swapped[other] = words[other], words[one]
        if (candidate := " ".join(swapped)) not in found:
            found.append(candidate)
        if len(found) == CHOICES:
            return found
    return None


def _context(lines: list[str]) -> str:
    """The last whole lines, `CONTEXT` characters at most."""
    taken: list[str] = []
    for line in reversed(lines):
        if sum(len(other) + 1 for other in taken) + len(line) > CONTEXT:
            break
        taken.append(line)
    return "\n".join(reversed(taken))
