"""Functions: those of the standard library that run alone, to be completed from their signature and docstring.

What a function needs of its module, imports, constants and other functions, stands above it. The tests are calls of the
real function with drawn arguments, and what it returned.
"""

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kdlm.jail import Limits, run
from kdlm.sandbox.corpus import stdlib_digest
from kdlm.sandbox.function_calls import CALLS, draw_calls
from kdlm.sandbox.function_source import source_of
from kdlm.sandbox.jsonl import write_jsonl
from kdlm.sandbox.progress import Progress

LIMITS = Limits(seconds=60)  # of code that comes with Python: a guard
FEWEST, LONGEST_RESULT = 4, 1_000


@dataclass(frozen=True)
class Function:
    """A function to complete.

    Attributes:
        name: with its module.
        prompt: what it needs, its signature and its docstring.
        body: the rest of it.
        tests: calls with their results, as `kdlm.jail.run` takes them.
    """

    name: str
    prompt: str
    body: str
    tests: list[dict[str, str]]


@dataclass(frozen=True)
class Functions:
    """Functions that run alone as they do at home: `eval.jsonl`.

    Attributes:
        tests: calls of each.
        longest: characters that its prompt may have.
        seed: of their order.
    """

    tests: int
    longest: int
    seed: int
    needs: tuple[str, ...] = ()

    def ingredients(self) -> dict[str, Any]:
        return {**asdict(self), "calls": CALLS, "documents": stdlib_digest()}

    def make(self, folder: Path, built: dict[str, Path], progress: Progress, name: str) -> dict[str, Any]:
        kept: list[Function] = []
        with progress(f"{name}: running them", len(CALLS)) as advance:
            for module, templates in CALLS.items():
                kept += functions_of(module, templates, self.tests, self.longest)
                advance(1, module)
        random.Random(self.seed).shuffle(kept)  # so that the first few are of many modules
        write_jsonl(folder / "eval.jsonl", map(asdict, kept))
        return {"eval": len(kept)}


def functions_of(module: str, templates: Sequence[str], tests: int, longest: int) -> Iterator[Function]:
    """Yield the functions of a module that this Python has, and that run alone as they do at home."""
    source = source_of(module)
    found: dict[str, tuple[str, str, list[str]]] = {}
    for template in templates:
        name = next((word for word in re.findall(r"\w+", template) if source.function(word)), None)
        if name is not None and (parts := source.cut(name)) is not None and len(parts[0]) <= longest:
            found[name] = (*parts, draw_calls(f"{module}.{name}", template, tests))
    at_home = _results(module, list(found), [call for *_, calls in found.values() for call in calls])
    for name, (prompt, body, calls) in found.items():
        results = {call: result for call in calls if (result := at_home[call]) is not None}
        kept = [{"call": call, "result": text} for call, text in results.items() if len(text) <= LONGEST_RESULT]
        if len(kept) < FEWEST or len(set(results.values())) < 2:  # what returns the same every time is no test
            continue
        if all(run(prompt + body, kept, limits=LIMITS, isolation="limits_only").passed):
            yield Function(f"{module}.{name}", prompt, body, kept)


def _results(module: str, names: list[str], calls: list[str]) -> dict[str, str | None]:
    """What calls of a module's own functions return; None where they raise, or it does not keep the function."""
    program = f"import importlib\nhome = importlib.import_module({module!r})\nglobals().update(vars(home))\n"
    asked = [{"call": call, "result": ""} for call in calls]
    return dict(zip(calls, run(program, asked, limits=LIMITS, isolation="limits_only").results, strict=True))
