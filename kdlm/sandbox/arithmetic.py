"""Sums, differences and products, worked digit by digit as on paper.

| level | problems |
|---|---|
| 1 | add, two operands of 2 digits |
| 2 | add, subtract, two operands of 2 to 3 digits; differences may be negative |
| 3 | add, subtract, two operands of 4 to 5 digits; multiply 2 digits by 1 |
| 4 | add, subtract, three operands of 2 to 3 digits; multiply 2 digits by 2 |
| 5 | add, subtract, four operands of 3 to 4 digits; multiply 3 digits by 2 |
"""

import random
from typing import Literal

from kdlm.sandbox.tasks import Split, Task, generate, solved

Sign = Literal["+", "-"]


def arithmetic(*, seed: int, level: int, n: int, split: Split = "train") -> list[Task]:
    """Return `n` different arithmetic tasks of a level (1 to 5); see `tasks.generate`."""
    return generate(_problem, seed=seed, level=level, n=n, split=split)


def _problem(generator: random.Random, level: int) -> Task:
    def number(fewest: int, most: int) -> int:
        digits = generator.randint(fewest, most)
        return generator.randint(10 ** (digits - 1), 10**digits - 1)

    if level == 1:
        return _chain([number(2, 2), number(2, 2)], ["+"], level)
    if level == 2:
        return _chain([number(2, 3), number(2, 3)], _signs(generator, 1), level)
    multiply = generator.random() < 0.5
    if level == 3:
        if multiply:
            return _product(number(2, 2), generator.randint(2, 9), level)
        return _chain([number(4, 5), number(4, 5)], _signs(generator, 1), level)
    if level == 4:
        if multiply:
            return _product(number(2, 2), number(2, 2), level)
        return _chain([number(2, 3) for _ in range(3)], _signs(generator, 2), level)
    if multiply:
        return _product(number(3, 3), number(2, 2), level)
    return _chain([number(3, 4) for _ in range(4)], _signs(generator, 3), level)


def _signs(generator: random.Random, n: int) -> list[Sign]:
    return [generator.choice(("+", "-")) for _ in range(n)]


def _chain(operands: list[int], signs: list[Sign], level: int) -> Task:
    """Work from left to right, one pair at a time."""
    total, steps = operands[0], []
    expression = str(operands[0])
    for sign, operand in zip(signs, operands[1:], strict=True):
        expression += f" {sign} {operand}"
        total = _combine(total, sign, operand, steps)
    kind = "mixed" if len(operands) > 2 else {"+": "add", "-": "subtract"}[signs[0]]
    return solved(f"What is {expression}?", steps, str(total), level, kind)


def _product(a: int, b: int, level: int) -> Task:
    """Long multiplication: one partial product a digit of `b`, then their sum."""
    steps: list[str] = []
    total = None
    for place, digit in enumerate(reversed(str(b))):
        steps.append(f"{a} * {digit}:")
        partial = _times_digit(a, int(digit), steps) * 10**place
        if place:
            steps.append(f"with {place} zero: {partial}")
        total = partial if total is None else _combine(total, "+", partial, steps)
    assert total == a * b
    return solved(f"What is {a} * {b}?", steps, str(total), level, "multiply")


def _times_digit(a: int, digit: int, steps: list[str]) -> int:
    carry, written = 0, ""
    for column in reversed(str(a)):
        value = int(column) * digit + carry
        plus = f" + {carry}" if carry else ""
        carry = value // 10
        written = str(value % 10) + written
        steps.append(f"{column} * {digit}{plus} = {value}" + _write(value % 10, carry, "carry"))
    return int(str(carry) + written)


def _combine(a: int, sign: Sign, b: int, steps: list[str]) -> int:
    """Append the columns of `a sign b` to the steps (a of any sign, b >= 0) and return the result."""
    steps.append(f"{a} {sign} {b}:")
    if a < 0:  # -a + b = b - a and -a - b = -(a + b)
        result = _subtract(b, -a, steps) if sign == "+" else -_add(-a, b, steps)
    else:
        result = _add(a, b, steps) if sign == "+" else _subtract(a, b, steps)
    assert result == (a + b if sign == "+" else a - b)
    steps.append(f"= {result}")
    return result


def _columns(a: int, b: int) -> list[tuple[int, int]]:
    """The digits of both numbers, lowest place first, the shorter one filled with zeros."""
    width = max(len(str(a)), len(str(b)))
    return [(int(x), int(y)) for x, y in zip(str(a).zfill(width)[::-1], str(b).zfill(width)[::-1], strict=True)]


def _add(a: int, b: int, steps: list[str]) -> int:
    carry, written = 0, ""
    for x, y in _columns(a, b):
        value = x + y + carry
        plus = f" + {carry}" if carry else ""
        carry = value // 10
        written = str(value % 10) + written
        steps.append(f"{x} + {y}{plus} = {value}" + _write(value % 10, carry, "carry"))
    return int(str(carry) + written)


def _subtract(a: int, b: int, steps: list[str]) -> int:
    """The smaller is taken from the larger; the sign is put back after."""
    if a < b:
        steps.append(f"{a} < {b}, so -({b} - {a})")
        return -_subtract(b, a, steps)
    borrow, written = 0, ""
    for x, y in _columns(a, b):
        value = x - y - borrow
        minus = f" - {borrow}" if borrow else ""
        borrow = int(value < 0)
        top = x + 10 * borrow
        written = str(value % 10) + written
        steps.append(f"{top} - {y}{minus} = {value % 10}" + _write(value % 10, borrow, "borrow"))
    return int(written)


def _write(digit: int, moved: int, verb: str) -> str:
    return f", write {digit}" + (f", {verb} {moved}" if moved else "")
