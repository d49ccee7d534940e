"""Language models that are tables: logits of the next token given the last. And texts, batches and steps for them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from kdlm.data import Collator
from kdlm.methods import Method, Step
from kdlm.signal import IGNORE_INDEX, Dense, Head, Hidden, Rows

VOCAB = 13
Layout = Literal["padded", "padding_free"]


@dataclass(frozen=True)
class Text:
    """A prompt and a response, of the student's where `sampled`."""

    ids: list[int]
    prompt: int
    sampled: bool = False


class Table:
    """Logits `[last token, next token]`, as a `Dense` signal or, with `width`, as hidden states and a head."""

    def __init__(self, seed: int, *, scale: float = 1.5, width: int | None = None, vocab: int = VOCAB):
        draw = torch.Generator().manual_seed(seed)
        rows = torch.randn(vocab, width or vocab, generator=draw, dtype=torch.float64)
        head = torch.randn(vocab, width or 1, generator=draw, dtype=torch.float64)
        self.rows = (rows * scale).requires_grad_()
        self.head = None if width is None else Head(head.requires_grad_())

    def __call__(self, batch: dict[str, Tensor], rows: Rows) -> Hidden | Dense:
        said = rows.select(self.rows[batch["input_ids"]])
        return Dense(said) if self.head is None else Hidden(said, self.head)

    @property
    def parameters(self) -> list[Tensor]:
        return [self.rows] if self.head is None else [self.rows, self.head.weight]

    def logits(self) -> Tensor:
        return self.rows if self.head is None else self.head.logits(self.rows)


def texts(
    lengths: Sequence[int], *, seed: int = 0, sampled: Sequence[bool] | None = None, prompt: int = 2
) -> list[Text]:
    """Random texts of these lengths; by default every second one is the student's."""
    draw = torch.Generator().manual_seed(seed)
    flags = sampled if sampled is not None else [bool(i % 2) for i in range(len(lengths))]
    made = [torch.randint(0, VOCAB, (length,), generator=draw).tolist() for length in lengths]
    return [Text(ids, 2, flag) for ids, flag in zip(made, flags, strict=True)]


@torch.no_grad()
def written(table: Table, count: int, length: int, seed: int, *, sampled: bool) -> list[Text]:
    """Texts that a table writes after a random first token, which is the prompt."""
    draw = torch.Generator().manual_seed(seed)
    probabilities = table.logits().softmax(-1)
    ids = torch.randint(0, len(probabilities), (count, 1), generator=draw)
    for _ in range(length):
        ids = torch.cat([ids, torch.multinomial(probabilities[ids[:, -1]], 1, generator=draw)], -1)
    return [Text(row, 1, sampled) for row in ids.tolist()]


def batch_of(chosen: Sequence[Text], layout: Layout = "padded", *, told: bool = True) -> dict[str, Tensor]:
    """Collate texts; `told` adds which tokens the student drew."""
    rows = [
        {"input_ids": text.ids, "labels": [IGNORE_INDEX] * text.prompt + text.ids[text.prompt :]} for text in chosen
    ]
    batch = Collator(0, layout=layout)(rows)
    if told:
        sampled = [
            {"input_ids": [int(text.sampled and i >= text.prompt) for i in range(len(text.ids))], "labels": text.ids}
            for text in chosen
        ]
        batch["sampled"] = Collator(0, layout=layout)(sampled)["input_ids"].bool()
    return batch


def total(method: Method, nets: dict[str, Any], batches: Sequence[dict[str, Tensor]]) -> Tensor:
    """Return the loss of an optimiser step of these micro-batches: sums over counts, as the trainer has it."""
    counted = [method.counts(batch) for batch in batches]
    counts = {unit: sum(int(c[unit]) for c in counted) for unit in counted[0]}
    loss = torch.zeros((), dtype=torch.float64)
    for batch in batches:
        terms = method.losses(nets, batch, frozenset({"student"}), Step(0, 10))
        loss = loss + sum(t.weight * t.sum / max(1, counts[t.unit]) for t in terms.terms.values())
    return loss


def gradients(method: Method, nets: dict[str, Any], batches: Sequence[dict[str, Tensor]]) -> list[Tensor]:
    return list(torch.autograd.grad(total(method, nets, batches), nets["student"].parameters))


def descend(method: Method, nets: dict[str, Any], batches, *, rate: float) -> None:
    """One plain gradient step of the student."""
    for parameter, gradient in zip(nets["student"].parameters, gradients(method, nets, batches), strict=True):
        with torch.no_grad():
            parameter -= rate * gradient
