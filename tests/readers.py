"""Tokenizers of every kind that text is aligned between."""

from functools import cache
from typing import Any

from transformers import AutoTokenizer, ByT5Tokenizer

from kdlm.sandbox import build

KINDS = ["tiny", "1k", "bytes", "unigram-1k", "spbpe-1k", "wordpiece-1k", "nfkc-1k"]
LOSSY = ["wordpiece-1k", "nfkc-1k"]
EXACT = ["tiny", "1k", "bytes", "unigram-1k", "spbpe-1k", "byt5"]


def fresh(kind: str) -> Any:
    """Return a new tokenizer of the sandbox, or ByT5's, that a test may change."""
    if kind == "byt5":
        return ByT5Tokenizer()
    return AutoTokenizer.from_pretrained(build(f"code-tokenizer-{kind}", progress=None))


reader = cache(fresh)
