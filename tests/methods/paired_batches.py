"""Batches of short texts read by two sandbox tokenizers, and networks whose words are drawn once."""

from typing import Any

import torch
from readers import reader
from two_tokenizers import TEXTS, own_rows

from kdlm.data.load import text_collator
from kdlm.methods.cross_tokenizer.aligned import AlignedMethod
from kdlm.methods.method import Step
from kdlm.signal import Dense, TopK

STEP = Step(0, 10)


def batch_of(ours: str, theirs: str, *, ended: bool = True, layout: Any = "padded") -> Any:
    return text_collator(layout, reader(ours), reader(theirs))(own_rows(ours, TEXTS[:4], ended=ended))


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
    method.introduce(*text_collator("padded", reader(ours), reader(theirs)).spellings)
    return method
