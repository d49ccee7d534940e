"""What a program may use, what it is tested by, and what became of it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

MIB = 1 << 20

Isolation = Literal["full", "limits_only"]
Outcome = Literal["done", "raised", "timed_out", "killed"]
Test = str | Mapping[str, str]
"""Python to run after the program, which passes if it does not raise; or `{"call": expression, "result": its repr}`."""


@dataclass(frozen=True)
class Limits:
    """What a program may use.

    Attributes:
        seconds: from its first line on, with all tests.
        memory: MiB of address space, of which Python itself takes about 30.
        disk: MiB in its folder.
        output: KiB on standard output and error together.
    """

    seconds: float = 5.0
    memory: int = 512
    disk: int = 16
    output: int = 256


@dataclass(frozen=True)
class Run:
    """What became of a program.

    Attributes:
        outcome: `done`; `raised`, by itself; `timed_out`; `killed`, by another limit or a signal.
        reason: why it is not done, or why the first test failed.
        passed: for each test whether it passed.
        results: for each call what it returned, as `repr` writes it; None where it raised, or is no call.
        output: what it printed, to standard output and error.
    """

    outcome: Outcome
    reason: str | None
    passed: tuple[bool, ...]
    results: tuple[str | None, ...]
    output: str
