"""Two readings of short texts by two sandbox tokenizers, and networks whose words are drawn once."""

from functools import cache
from typing import Any

import torch
from transformers import AutoTokenizer

from kdlm.data.load import text_collator
from kdlm.methods.cross_tokenizer.aligned import AlignedMethod
from kdlm.methods.method import Step
from kdlm.sandbox import build
from kdlm.signal import Dense, TopK

TEXTS = [
    "def step(self, x_0):\n    return x_0 - self.rate  # 12",
    "import os\n\n\nclass Thing(object):\n    pass\n",
    "naïve = 'größe'  # 🙂\n",
    "for  name in names:\n\tprint(name)",
]
STEP = Step(0, 10)


@cache
def tokenizer(name: str) -> Any:
    return AutoTokenizer.from_pretrained(build(name))


def rows(name: str, ended: bool = True) -> list[dict[str, list[int]]]:
    """The texts as the student's tokens, the first of each not trained on; ended by its end of sequence."""
    made = []
    for text in TEXTS:
        ids = tokenizer(name)(text, add_special_tokens=False)["input_ids"]
        ids = [*ids, tokenizer(name).eos_token_id] if ended else ids
        made.append({"input_ids": ids, "labels": [-100, *ids[1:]], "length": len(ids)})
    return made


def batch_of(ours: str, theirs: str, *, ended: bool = True, layout: Any = "padded") -> Any:
    return text_collator(layout, tokenizer(ours), tokenizer(theirs))(rows(ours, ended))


class Says:
    """Answers with logits that depend on the text only, differentiable ones; or with the k most probable."""

    def __init__(self, vocab: int, seed: int, k: int | None = None):
        generator = torch.Generator().manual_seed(seed)
        self.table = torch.randn(97, vocab, dtype=torch.float64, generator=generator)
        self.table.requires_grad_()
        self.k = k

    def __call__(self, batch: Any, rows: Any) -> Dense | TopK:
        logits = self.table[rows.index % 97] + self.table[rows.labels % 89]
        if self.k is None:
            return Dense(logits)
        return TopK(*reversed(logits.log_softmax(-1).topk(self.k, dim=-1)))


def introduced(method: AlignedMethod, ours: str, theirs: str) -> AlignedMethod:
    method.introduce(*text_collator("padded", tokenizer(ours), tokenizer(theirs)).spellings)
    return method
