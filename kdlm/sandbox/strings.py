"""Puzzles on strings of lower-case letters: reverse, count, sort, Caesar's cipher. A level is a length."""

import random
import string

from kdlm.sandbox.tasks import Split, Task, generate, solved

LENGTHS = {1: (3, 4), 2: (5, 6), 3: (7, 8), 4: (9, 11), 5: (12, 15)}  # letters; fewest and most of each level


def strings(*, seed: int, level: int, n: int, split: Split = "train") -> list[Task]:
    """Return `n` different string tasks of a level (1 to 5); see `tasks.generate`."""
    return generate(_problem, seed=seed, level=level, n=n, split=split)


def _problem(generator: random.Random, level: int) -> Task:
    length = generator.randint(*LENGTHS[level])
    word = "".join(generator.choices(string.ascii_lowercase, k=length))
    make = generator.choice((_reverse, _count, _sort, _caesar))
    return make(generator, word, level)


def _reverse(generator: random.Random, word: str, level: int) -> Task:
    steps = [f"The letters of {word} are {' '.join(word)}.", f"From the last to the first: {' '.join(word[::-1])}."]
    return solved(f"Reverse the string {word}.", steps, word[::-1], level, "reverse")


def _count(generator: random.Random, word: str, level: int) -> Task:
    few = generator.sample(string.ascii_lowercase, 3)  # few different letters, so that there is something to count
    word = "".join(generator.choice(few) for _ in word)
    letter = generator.choice(few)
    steps, seen = [], 0
    for position, other in enumerate(word, start=1):
        seen += other == letter
        steps.append(f"{position} {other}: {seen}")
    return solved(f"How many times does {letter} occur in {word}?", steps, str(seen), level, "count")


def _sort(generator: random.Random, word: str, level: int) -> Task:
    steps, left = [], word
    while left:
        smallest = min(left)
        left = left.replace(smallest, "", 1)
        steps.append(f"take {smallest}, {left or 'nothing'} is left")
    return solved(f"Sort the letters of {word}.", steps, "".join(sorted(word)), level, "sort")


def _caesar(generator: random.Random, word: str, level: int) -> Task:
    shift = generator.randint(1, 5 * level)
    alphabet = string.ascii_lowercase
    moved = [alphabet[(alphabet.index(letter) + shift) % 26] for letter in word]
    steps = [f"{before} -> {after}" for before, after in zip(word, moved, strict=True)]
    prompt = f"Shift every letter of {word} by {shift} places in the alphabet, going on at a after z."
    return solved(prompt, steps, "".join(moved), level, "caesar")
