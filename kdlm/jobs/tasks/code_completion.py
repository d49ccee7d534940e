"""`kdlm_code_completion` and its `_pass` form: functions of the standard library, judged by running them."""

from typing import Any

from datasets import Dataset

from kdlm.jail import Isolation, Limits, run
from kdlm.jobs.tasks.problems import CHANCES, pass_at
from kdlm.sandbox import build
from kdlm.sandbox.jsonl import read_jsonl

LIMITS = Limits(seconds=10)


def documents(*, isolation: Isolation = "full", **_: Any) -> dict[str, Dataset]:
    """Return the sandbox's `functions` as `test`: each with `name`, `prompt`, `body`, `tests`, and its `isolation`.

    `limits_only`, in the metadata of a task that includes this one, is for machines that cannot isolate: it is unsafe.
    """
    rows = read_jsonl(build("functions") / "eval.jsonl")
    return {"test": Dataset.from_list([{**row, "isolation": isolation} for row in rows])}


def completes(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Return 1 for a text that passes all tests of its function, else 0; and the share of tests that it passes.

    Raises RuntimeError where the machine cannot run code in isolation.
    """
    (text,) = results
    share = share_passed(doc, text)
    return {"pass@1": float(share == 1), "tests_passed": share}


def passes(doc: dict[str, Any], results: list[list[str]]) -> dict[str, float]:
    """Return pass@k of one function for the k of `CHANCES`, from all its samples, and the mean share of tests passed.

    Raises ValueError when there are fewer samples than the largest k: `repeats` and the filter's `k` say how many.
    """
    (texts,) = results
    shares = [share_passed(doc, text) for text in texts]
    right = sum(share == 1 for share in shares)
    chances = {f"pass@{k}": pass_at(k, right=right, samples=len(texts)) for k in CHANCES}
    return {**chances, "tests_passed": sum(shares) / len(shares)}


def share_passed(doc: dict[str, Any], text: str) -> float:
    """Return the share of a function's tests that it passes with this text after its docstring."""
    found = run(doc["prompt"] + text, doc["tests"], limits=LIMITS, isolation=doc["isolation"])
    return sum(found.passed) / len(found.passed)
