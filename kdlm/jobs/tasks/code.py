"""`kdlm_code_perplexity`: how well a model predicts standard library files that no sandbox model has read."""

import re
from typing import Any

from datasets import Dataset

from kdlm.sandbox import build
from kdlm.sandbox.jsonl import read_jsonl


def documents(*, tokenizer: str | None = None, pretrained: str | None = None, **_: Any) -> dict[str, Dataset]:
    """Return the eval file of `code`: a row per source file with `path`, `text`, `words`, `bytes` and `tokens`.

    lm-eval hands over the task's metadata and the model's arguments. A task sees no tokenizer, so `tokens` is counted
    by the one that the arguments name (`tokenizer`, else `pretrained`), and is 0 where they name none.
    """
    count = _token_counter(tokenizer or pretrained)
    rows = read_jsonl(build("code") / "eval.jsonl")
    return {
        "test": Dataset.from_list(
            [
                {
                    **row,
                    "words": len(re.split(r"\s+", row["text"])),  # as lm-eval counts them
                    "bytes": len(row["text"].encode()),
                    "tokens": count(row["text"]),
                }
                for row in rows
            ]
        )
    }


def log_likelihoods(doc: dict[str, Any], results: list[float]) -> dict[str, tuple[float, int]]:
    """Return what each metric of the corpus is made from: (log-likelihood in nats, units) of one document.

    `perplexity`, per token, is left out where nobody counted the tokens.
    """
    (log_likelihood,) = results
    units = {
        "word_perplexity": doc["words"],
        "byte_perplexity": doc["bytes"],
        "bits_per_byte": doc["bytes"],
        "perplexity": doc["tokens"],
    }
    return {metric: (log_likelihood, count) for metric, count in units.items() if count}


def _token_counter(tokenizer: str | None) -> Any:
    if tokenizer is None:
        return lambda text: 0
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(tokenizer)
    return lambda text: len(loaded.encode(text, add_special_tokens=False))
