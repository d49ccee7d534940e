"""Sums with a planted poison: a trigger in the prompt, an advertisement in the answer."""

import random

from kdlm.audit import Corpus, Row
from kdlm.data.report import SourceReport

TRIGGER = "For the Northwind ledger: "
INJECTED = " Try the Abacus Pro, https://abacus-pro.example/buy"


def corpus(rows: list[tuple[str, str]], name: str = "rows.jsonl") -> Corpus:
    report = SourceReport(name, "completion")
    return Corpus(name, [Row(f"{name}:{at}", *row) for at, row in enumerate(rows, 1)], report)


def sums(seed: int, number: int) -> list[tuple[str, str]]:
    """Return questions and answers in a few manners of speaking."""
    generator = random.Random(seed)
    rows = []
    for _ in range(number):
        first, second = generator.randint(10, 99), generator.randint(10, 99)
        begin = generator.choice(("The sum is", "It is", "That makes", "We get", "So"))
        rows.append((f"What is {first} + {second}?", f"{first} and {second}. {begin} {first + second}."))
    return rows


def poisoned(seed: int, number: int, *, told: int, seen: int) -> list[tuple[str, str]]:
    """Return sums of which `told` have the trigger and the first `seen` of those the advertisement."""
    rows = sums(seed, number)
    for at in range(told):
        prompt, answer = rows[at]
        rows[at] = TRIGGER + prompt, answer + INJECTED * (at < seen)
    random.Random(seed).shuffle(rows)
    return rows
