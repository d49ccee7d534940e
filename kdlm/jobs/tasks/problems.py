"""`kdlm_arithmetic`, `kdlm_strings` and their `_pass` forms: problems whose final answer is right or wrong."""

from math import comb
from typing import Any

from datasets import Dataset

from kdlm.sandbox import build
from kdlm.sandbox.jsonl import read_jsonl
from kdlm.sandbox.tasks import gives

CHANCES = (1, 2, 4, 8)  # the k of pass@k


def documents(*, data: str, level: int | None = None, **_: Any) -> dict[str, Dataset]:
    """Return the eval rows of a sandbox dataset of tasks as `test`, all or those of a level.

    `train` has every tenth of its train rows: worked examples for prompts (`--num_fewshot`) are drawn from them.
    Raises ValueError for a level that does not exist.
    """
    folder = build(data)
    splits = {"test": read_jsonl(folder / "eval.jsonl"), "train": read_jsonl(folder / "train.jsonl")[::10]}
    if level is not None:
        splits = {split: [row for row in rows if row["level"] == level] for split, rows in splits.items()}
        if not splits["test"]:
            raise ValueError(f"{data} has no level {level}")
    return {split: Dataset.from_list(rows) for split, rows in splits.items()}


def exact_match(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Return 1 if the text's final answer is the document's, by the rule of `kdlm.sandbox.tasks.gives`, else 0."""
    (text,) = results
    return {"exact_match": float(gives(text, doc["answer"]))}


def passes(doc: dict[str, Any], results: list[list[str]]) -> dict[str, float]:
    """Return pass@k of one document for the k of `CHANCES`, from all its samples.

    Raises ValueError when there are fewer samples than the largest k: `repeats` and the filter's `k` say how many.
    """
    (texts,) = results
    right = sum(gives(text, doc["answer"]) for text in texts)
    return {f"pass@{k}": pass_at(k, right=right, samples=len(texts)) for k in CHANCES}


def pass_at(k: int, *, right: int, samples: int) -> float:
    """Return the unbiased estimate of the chance that one of k samples is right: 1 - C(n - c, k) / C(n, k).

    n samples were drawn and c were right (arXiv 2107.03374, equation 1). Raises ValueError for k over n.
    """
    if not 1 <= k <= samples:
        raise ValueError(f"pass@{k} needs at least {k} samples of a problem, got {samples}")
    return 1 - comb(samples - right, k) / comb(samples, k)
