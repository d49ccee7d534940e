"""Masking: which of the trained tokens of a text are hidden, and the batch that networks then read.

The process is that of masked diffusion with its linear schedule (MDLM, arXiv 2406.07524; LLaDA, arXiv 2502.09992): at
time t every token is hidden with probability t, and the negative log-likelihood of a text is at most the mean over t of
`1/t` times the sum of `-log q` over hidden tokens. Here k of a text's L tokens are hidden, k uniform from 1 to L, and
their sum counts L/k: the same mean (`1/t` is `L/k`; LLaDA, eq. 6), of less variance, and the weights of a text are L in
all whatever was drawn. What is hidden is a hash of the run's seed, the step and the number of the row (`Draws`), and
does not change with the batch that the row lies in.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kdlm.diffusion import Draws
from kdlm.losses import IGNORE_INDEX, CrossEntropy, measures_for
from kdlm.methods.method import Batch, Nets, Step, Terms
from kdlm.methods.tokens import TokenMethod
from kdlm.signal import Rows, sequence_of

EVALUATION = -1
"""The step that evaluation draws of: the same tokens are hidden at every evaluation of a run, and in no step."""
GROUP = 2**24
"""More sequences than one prompt has in a batch."""


@dataclass(frozen=True)
class Texts:
    """The sequences of a batch, one a row and padded on the right, however the batch lays them out.

    Attributes:
        ids: tokens, 0 on padding.
        attention: 1 where there is a token.
        trained: which tokens may be hidden; the others are given.
        key: a number of each sequence, to draw by: that of its row in the data, and its place in the group of those
            that have the same.
        weight: as how many each counts; None is 1 of each.
    """

    ids: Int[Tensor, "texts length"]
    attention: Int[Tensor, "texts length"]
    trained: Bool[Tensor, "texts length"]
    key: Int[Tensor, "texts"]
    weight: Float[Tensor, "texts"] | None = None

    @classmethod
    def of(cls, batch: Batch) -> "Texts":
        """Read a batch. Raises ValueError where its rows have no `index` to draw by."""
        if "index" not in batch:
            raise ValueError("what is hidden of a row is drawn by its number: give rows a column `index`")
        index = batch["index"]
        same = index[:, None] == index[None, :]
        key = index * GROUP + same.tril(-1).sum(-1)
        ids, trained, weight = batch["input_ids"], batch["labels"] != IGNORE_INDEX, batch.get("weight")
        if "position_ids" not in batch or "attention_mask" in batch:
            return cls(ids, batch.get("attention_mask", torch.ones_like(ids)), trained, key, weight)
        places = batch["position_ids"][0]
        at = sequence_of(batch)[0], places
        shape = len(index), int(places.max()) + 1
        return cls(
            ids.new_zeros(shape).index_put(at, ids[0]),
            ids.new_zeros(shape).index_put(at, torch.ones_like(places)),
            trained.new_zeros(shape).index_put(at, trained[0]),
            key,
            weight,
        )

    @property
    def sizes(self) -> Int[Tensor, "texts"]:
        """How many tokens of each sequence may be hidden: L."""
        return self.trained.sum(-1)

    def hidden(self, seed: int, step: int, name: str = "masks", *, spare: int = 0) -> Bool[Tensor, "texts length"]:
        """Draw which tokens are hidden: of each sequence k, uniform from 1 to L, any of them alike.

        `spare` of them stay where there are as many (1: the rest is not empty either).
        """
        draws = Draws(self.key, seed, step)
        most = (self.sizes - spare).clamp(min=1)
        count = 1 + (draws.uniform(f"{name} count") * most).long().clamp(max=most - 1)
        order = draws.uniform(name, (self.ids.shape[1],)).masked_fill(~self.trained, torch.inf)
        rank = order.argsort(dim=-1, stable=True).argsort(dim=-1, stable=True)
        return self.trained & (rank < count[:, None])


def padded(batch: Batch) -> Batch:
    """Return the sequences of a batch one a row, for models that see all of a row; as it is where they are so."""
    if "position_ids" not in batch or "attention_mask" in batch:
        return batch
    number = sequence_of(batch)
    texts = Texts.of({**batch, "index": torch.arange(int(number.max()) + 1, device=number.device)})
    weight = {} if texts.weight is None else {"weight": texts.weight}
    return {"input_ids": texts.ids, "attention_mask": texts.attention} | weight


@dataclass(frozen=True)
class Masked:
    """Texts with some tokens hidden.

    Attributes:
        batch: what networks read.
        rows: the hidden places. Unlike those of a causal model, a row's label is the token at its own place.
        text: number of the sequence of each row.
        weights: L/k of that sequence.
        hidden: k of each sequence.
        weight: of each sequence, as of `Texts`.
    """

    batch: Batch
    rows: Rows
    text: Int[Tensor, "rows"]
    weights: Float[Tensor, "rows"]
    hidden: Int[Tensor, "texts"]
    weight: Float[Tensor, "texts"] | None = None

    def by_text(self, values: Float[Tensor, "rows"]) -> Float[Tensor, "texts"]:
        """Sum a value of each row over its sequence."""
        return values.new_zeros(len(self.hidden)).index_add(0, self.text, values)


def masked(texts: Texts, hidden: Bool[Tensor, "texts length"], mask_id: int) -> Masked:
    """Hide tokens behind the token `mask_id`."""
    index = hidden.flatten().nonzero().squeeze(-1)
    text, count = index // texts.ids.shape[1], hidden.sum(-1)
    read = {"input_ids": texts.ids.masked_fill(hidden, mask_id), "attention_mask": texts.attention}
    rows = Rows(index, texts.ids.flatten().index_select(0, index), None if texts.weight is None else texts.weight[text])
    return Masked(read, rows, text, (texts.sizes / count.clamp(min=1))[text], count, texts.weight)


class MaskedMethod(TokenMethod):
    """What methods for masked language models share: hidden tokens, and the evaluation."""

    def hide(self, nets: Nets, batch: Batch, seed: int, step: int) -> Masked:
        """Hide tokens of a batch, drawn for a step of a run."""
        texts = Texts.of(batch)
        return masked(texts, texts.hidden(seed, step), nets["student"].mask_id)

    def evaluate(self, nets: Nets, batch: Batch, step: Step) -> Terms:
        """Give the losses and every measure at hidden tokens, weighted as in training: `cross_entropy` is the bound.

        The same tokens are hidden at every evaluation of a run.
        """
        seen = self.hide(nets, batch, step.seed, EVALUATION)
        teacher = nets["teacher"](seen.batch, seen.rows) if "teacher" in nets else None
        student = nets["student"](seen.batch, seen.rows)
        measures: Any = measures_for(None if teacher is None else type(teacher))
        judged = self.weighted(step) or [("cross_entropy", CrossEntropy(), 1.0)]
        return self.compare(student, teacher, seen.rows, step, measures, judged, row_weights=seen.weights)
