"""Signals: what a model says about the kept positions of a batch.

A teacher answers a batch with one of these, whatever stands behind it (a local model, a cache, a server), and the
losses need to know nothing else. A student's prediction is a `Dense` or a `Hidden` too.

Rows: a batch `[batch, length]` has one row per position whose next token is trained on. `Rows.index` says which.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, overload

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

IGNORE_INDEX = -100
"""The label of a token that is not trained on (torch's own default)."""


def answers(labels: Sequence[int] | np.ndarray) -> np.ndarray:
    """Return where each run of trained tokens begins."""
    trained = np.flatnonzero(np.asarray(labels) != IGNORE_INDEX)
    return trained[np.diff(trained, prepend=-2) > 1]  # -2 is next to no place


def domain_id(name: str) -> int:
    """Return the number by which rows and batches know a domain: a hash, as a signed 64-bit integer.

    The same everywhere, so that data and teachers agree on it without a list of all domains.
    """
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), signed=True)


def summed(values: Shaped[Tensor, "items"], weights: Float[Tensor, "items"] | None) -> Shaped[Tensor, ""]:
    """Return the sum of a value of each item, an item of weight w counting as w items: where row weights enter.

    In the values' own dtype; what is counted (integers, truth) is so in float64. Without weights the plain sum.
    """
    if weights is None:
        return values.sum()
    return (values * weights.to(values.dtype if values.is_floating_point() else torch.float64)).sum()


@dataclass(frozen=True)
class Rows:
    """The kept positions of a batch: where they are, which token follows, and how much each counts.

    Attributes:
        index: position `b * length + t` of each row in the flattened batch.
        labels: the token at `t + 1`, never IGNORE_INDEX.
        weights: as how many rows each counts: the weight of its sequence (see `weights_of`); None is 1 of each.
    """

    index: Int[Tensor, "rows"]
    labels: Int[Tensor, "rows"]
    weights: Float[Tensor, "rows"] | None = None

    def __len__(self) -> int:
        return self.index.shape[0]

    def sum(self, values: Shaped[Tensor, "rows"]) -> Shaped[Tensor, ""]:
        """Return the sum of a value of each row, by the rows' weights: the way from rows to a term or a metric."""
        return summed(values, self.weights)

    def take(self, which: Shaped[Tensor, "n"]) -> "Rows":
        """Return some of the rows, by their numbers or by truth."""
        return Rows(self.index[which], self.labels[which], None if self.weights is None else self.weights[which])

    def select(self, x: Shaped[Tensor, "batch length *rest"]) -> Shaped[Tensor, "rows *rest"]:
        """Return the kept rows of a per-position tensor."""
        return x.flatten(0, 1).index_select(0, self.index)

    def of_labels(self, x: Shaped[Tensor, "batch length"]) -> Shaped[Tensor, "rows"]:
        """Return what a per-token tensor says of the labels: at `t + 1` where the row is at `t`."""
        return x.flatten().index_select(0, self.index + 1)


def sequence_of(batch: dict[str, Tensor]) -> Int[Tensor, "batch length"]:
    """Return the number of each token's sequence: its row, or without padding how often positions have restarted.

    That is also true of several sequences that were packed into one row of data.
    """
    ids = batch["input_ids"]
    if "position_ids" in batch and "attention_mask" not in batch:
        return (batch["position_ids"] == 0).flatten().cumsum(0).view_as(ids) - 1
    return torch.arange(len(ids), device=ids.device)[:, None].expand_as(ids)


def weights_of(batch: dict[str, Tensor]) -> Float[Tensor, "batch length"] | None:
    """Return the weight of each token's sequence (`batch["weight"]`, one for each); None where all count alike."""
    return batch["weight"][sequence_of(batch)] if "weight" in batch else None


@dataclass(frozen=True)
class Head:
    """The projection of a language model from its last hidden state to logits, with what the model does after it.

    Attributes:
        weight: one row per token id; may have more rows than the tokenizer has tokens (padding).
        bias: added to the product, or None.
        logit_scale: factor on the logits (Cohere's `logit_scale`, 1 / Granite's `logits_scaling`).
        softcap: `final_logit_softcapping` of Gemma-2 and its kin: `cap * tanh(logits / cap)`, or None.
        group: the ranks of tensor parallelism, all with the same rows, over which weight and bias are sliced: DTensors
            of which each rank holds some token ids. None where this rank has them all.
    """

    weight: Float[Tensor, "vocab hidden"]
    bias: Float[Tensor, "vocab"] | None = None
    logit_scale: float = 1.0
    softcap: float | None = None
    group: ProcessGroup | None = None

    @property
    def vocab_size(self) -> int:
        return self.weight.shape[0]

    def whole(self) -> "Head":
        """Return the head with all ids on this rank; every rank of `group` must ask."""
        if self.group is None:
            return self
        weight, bias = _gathered(self.weight), None if self.bias is None else _gathered(self.bias)
        return replace(self, weight=weight, bias=bias, group=None)

    def slice(self) -> "Head":
        """Return this rank's slice of a sliced head, without communication."""
        weight, bias = _local(self.weight), None if self.bias is None else _local(self.bias)
        return replace(self, weight=weight, bias=bias)

    def cut(self, vocab: int) -> "Head":
        """Return the head of the first `vocab` ids: views, no copy; of a sliced head all ids are gathered."""
        if vocab == self.vocab_size:
            return self
        of = self.whole()
        return replace(of, weight=of.weight[:vocab], bias=None if of.bias is None else of.bias[:vocab])

    def to(self, device: torch.device) -> "Head":
        """Return the head on a device; itself where it is there."""
        if self.weight.device == device:
            return self
        return replace(self, weight=self.weight.to(device), bias=None if self.bias is None else self.bias.to(device))

    def detach(self) -> "Head":
        """Return the head as it is, out of reach of gradients."""
        return replace(self, weight=self.weight.detach(), bias=None if self.bias is None else self.bias.detach())

    def transform(self, raw: Float[Tensor, "*rows vocab"]) -> Float[Tensor, "*rows vocab"]:
        """Turn the bare product `hidden @ weight.T + bias` into the model's logits."""
        logits = raw if self.logit_scale == 1.0 else raw * self.logit_scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def logits(self, hidden: Float[Tensor, "*rows hidden"]) -> Float[Tensor, "*rows vocab"]:
        """Project: the whole `[rows, vocab]` tensor. The chunked losses exist to avoid calling this on all rows."""
        of = self.whole()
        weight, bias = of.weight.to(hidden.dtype), None if of.bias is None else of.bias.to(hidden.dtype)
        return self.transform(torch.nn.functional.linear(hidden, weight, bias))


def _gathered(x: Tensor) -> Tensor:
    """Return all of a slice: the ranks' rows are the same, so each keeps its part of the gradient as it is."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def _local(x: Tensor) -> Tensor:
    return x.to_local() if isinstance(x, DTensor) else x


@dataclass(frozen=True)
class Dense:
    """Logits over the whole vocabulary."""

    logits: Float[Tensor, "rows vocab"]

    @property
    def vocab_size(self) -> int:
        return self.logits.shape[-1]

    def cut(self, vocab: int) -> "Dense":
        """Return the signal over the first `vocab` ids: a view, no copy."""
        return Dense(self.logits[:, :vocab])


@dataclass(frozen=True)
class Hidden:
    """Last hidden states and the head that turns them into logits: exact, and 37 to 74 times smaller than logits."""

    hidden: Float[Tensor, "rows hidden"]
    head: Head

    @property
    def vocab_size(self) -> int:
        return self.head.vocab_size

    def cut(self, vocab: int) -> "Hidden":
        """Return the signal over the first `vocab` ids: views, no copy."""
        return Hidden(self.hidden, self.head.cut(vocab))


@dataclass(frozen=True)
class Sampled:
    """Tokens drawn from the teacher (random-sampling KD, arXiv 2503.16870).

    Attributes:
        ids: drawn token ids; a place with count 0 is padding.
        counts: importance-weighted number of draws of each id.
    """

    ids: Int[Tensor, "rows draws"]
    counts: Float[Tensor, "rows draws"]


@dataclass(frozen=True)
class Draws:
    """Tokens drawn from what the k most probable ones leave, in proportion to their probabilities.

    Attributes:
        ids: drawn token ids; a place with count 0 is padding.
        log_probs: their log-probabilities under the full softmax.
        counts: how often each was drawn.
    """

    ids: Int[Tensor, "rows draws"]
    log_probs: Float[Tensor, "rows draws"]
    counts: Float[Tensor, "rows draws"]


@dataclass(frozen=True)
class TopK:
    """The k most probable tokens, with what is left as one bucket, or known by some draws from it.

    Attributes:
        ids: distinct token ids of each row.
        log_probs: their natural log-probabilities under the full softmax at temperature 1 (not renormalised).
        draws: from the rest. They make forward KL unbiased; the other divergences look at the bucket.
    """

    ids: Int[Tensor, "rows k"]
    log_probs: Float[Tensor, "rows k"]
    draws: Draws | None = None

    def cut(self, at: slice) -> "TopK":
        """Return some of the rows."""
        draws = self.draws and Draws(self.draws.ids[at], self.draws.log_probs[at], self.draws.counts[at])
        return TopK(self.ids[at], self.log_probs[at].detach(), draws)

    def spread(self) -> tuple[Sampled, Float[Tensor, "rows"]]:
        """Return the k tokens and the draws as one sparse distribution, and the sum of its weights times log p.

        Draws share the mass of the rest by their counts, so that the expectation over them is the teacher.
        """
        assert self.draws is not None
        p = self.log_probs.detach().float().exp()
        rest = (1 - p.sum(-1, keepdim=True)).clamp(min=0)
        counts = self.draws.counts / self.draws.counts.sum(-1, keepdim=True).clamp(min=1)
        weights = torch.cat([p, rest * counts], -1)
        logs = torch.cat([self.log_probs.detach().float(), self.draws.log_probs], -1).clamp(min=-1e4)
        return Sampled(torch.cat([self.ids, self.draws.ids], -1), weights), (weights * logs).sum(-1)


@dataclass(frozen=True)
class LogProbs:
    """The teacher's natural log-probabilities of the tokens that the text has: no distribution to compare with."""

    log_probs: Float[Tensor, "rows"]


@dataclass(frozen=True)
class Mixture:
    """Several teachers' distributions over the same ids, and how they are averaged in each row.

    The average is taken where the losses want it, a few rows at a time, so that no `[rows, vocab]` tensor exists. Each
    member is cut to the ids that are compared before its softmax.

    Attributes:
        members: at least one.
        log_weights: logarithms of the members' weights, whose exponentials add up to 1; -inf leaves a member out.
        space: `probability` gives `sum_i w_i p_i`, `log` gives `prod_i p_i^w_i`, up to its normalisation.
        confidence: where it is a number tau, each weight is multiplied by `exp(-entropy of the member's row / tau)`,
            and the weights of the row are normalised again.
    """

    members: "tuple[Hidden | Dense, ...]"
    log_weights: Float[Tensor, "rows members"]
    space: Literal["probability", "log"] = "probability"
    confidence: float | None = None

    def cut(self, vocab: int) -> "Mixture":
        """Return the mixture of what the members say over the first `vocab` ids: views, no copy."""
        return replace(self, members=tuple(member.cut(vocab) for member in self.members))

    def add(
        self,
        member: int,
        logits: Float[Tensor, "n vocab"],
        at: slice,
        total: Float[Tensor, "n vocab"],
        mass: Float[Tensor, "n 1"],
    ) -> None:
        """Take a member's logits of the rows `at` into their average, in place.

        `mass` is the logarithm of the weight that is in `total`, -inf at first. When all members are in, `total` is the
        mixture's logits; at first it is -inf in probability space, 0 in log space.
        """
        log_p = torch.log_softmax(logits.to(total.dtype), dim=-1)
        log_weight = self.log_weights[at, member, None].to(total.dtype)
        if self.confidence is not None:
            log_weight = log_weight - torch.special.entr(log_p.exp()).sum(-1, keepdim=True) / self.confidence
        mass.copy_(torch.logaddexp(mass, log_weight))
        if self.space == "probability":
            total.copy_(torch.logaddexp(total, log_p.add_(log_weight)))
        else:  # a running mean; a member without weight leaves it alone, also where it is the first
            share = (log_weight - mass).exp().nan_to_num(0.0)
            before = total.mul_(1 - share).masked_fill_(share == 1, 0.0)  # -inf of what is left out is not -inf
            torch.add(before, log_p.mul_(share).masked_fill_(share == 0, 0.0), out=total)


Signal = Dense | Hidden | TopK | Sampled | Mixture | LogProbs


@overload
def take(signal: Hidden | Dense, index: Int[Tensor, "n"]) -> Hidden | Dense: ...
@overload
def take(signal: Signal, index: Int[Tensor, "n"]) -> Signal: ...
def take(signal: Signal, index: Int[Tensor, "n"]) -> Signal:
    """Return the rows `index` of a signal, in their order: copies, in the signal's graph."""
    match signal:
        case Hidden(hidden=hidden):
            return replace(signal, hidden=hidden.index_select(0, index))
        case Dense(logits=logits):
            return Dense(logits.index_select(0, index))
        case Mixture(members=members, log_weights=log_weights):
            chosen = tuple(take(member, index) for member in members)
            return replace(signal, members=chosen, log_weights=log_weights.index_select(0, index))
        case TopK(ids=ids, log_probs=log_probs, draws=draws):
            few = draws and Draws(draws.ids[index], draws.log_probs[index], draws.counts[index])
            return TopK(ids.index_select(0, index), log_probs.index_select(0, index), few)
        case Sampled(ids=ids, counts=counts):
            return Sampled(ids.index_select(0, index), counts.index_select(0, index))
        case LogProbs(log_probs=log_probs):
            return LogProbs(log_probs.index_select(0, index))
