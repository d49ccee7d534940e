"""Signals: what a model says about the kept positions of a batch.

A teacher answers a batch with one of these, whatever stands behind it (a local model, a cache, a server), and the
losses need to know nothing else. A student's prediction is a `Dense` or a `Hidden` too.

Rows: a batch `[batch, length]` has one row per position whose next token is trained on. `Rows.index` says which.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

IGNORE_INDEX = -100
"""The label of a token that is not trained on (torch's own default)."""


@dataclass(frozen=True)
class Rows:
    """The kept positions of a batch: where they are and which token follows.

    Attributes:
        index: position `b * length + t` of each row in the flattened batch.
        labels: the token at `t + 1`, never IGNORE_INDEX.
    """

    index: Int[Tensor, "rows"]
    labels: Int[Tensor, "rows"]

    def __len__(self) -> int:
        return self.index.shape[0]

    def select(self, x: Float[Tensor, "batch length *rest"]) -> Float[Tensor, "rows *rest"]:
        """Return the kept rows of a per-position tensor."""
        return x.flatten(0, 1).index_select(0, self.index)


@dataclass(frozen=True)
class Head:
    """The projection of a language model from its last hidden state to logits, with what the model does after it.

    Attributes:
        weight: one row per token id; may have more rows than the tokenizer has tokens (padding).
        bias: added to the product, or None.
        logit_scale: factor on the logits (Cohere's `logit_scale`, 1 / Granite's `logits_scaling`).
        softcap: `final_logit_softcapping` of Gemma-2 and its kin: `cap * tanh(logits / cap)`, or None.
    """

    weight: Float[Tensor, "vocab hidden"]
    bias: Float[Tensor, "vocab"] | None = None
    logit_scale: float = 1.0
    softcap: float | None = None

    @property
    def vocab_size(self) -> int:
        return self.weight.shape[0]

    def cut(self, vocab: int) -> "Head":
        """Return the head of the first `vocab` ids: views, no copy."""
        if vocab == self.vocab_size:
            return self
        return replace(self, weight=self.weight[:vocab], bias=None if self.bias is None else self.bias[:vocab])

    def transform(self, raw: Float[Tensor, "*rows vocab"]) -> Float[Tensor, "*rows vocab"]:
        """Turn the bare product `hidden @ weight.T + bias` into the model's logits."""
        logits = raw if self.logit_scale == 1.0 else raw * self.logit_scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def logits(self, hidden: Float[Tensor, "*rows hidden"]) -> Float[Tensor, "*rows vocab"]:
        """Project: the whole `[rows, vocab]` tensor. The chunked losses exist to avoid calling this on all rows."""
        weight = self.weight.to(hidden.dtype)
        bias = None if self.bias is None else self.bias.to(hidden.dtype)
        return self.transform(torch.nn.functional.linear(hidden, weight, bias))


@dataclass(frozen=True)
class Dense:
    """Logits over the whole vocabulary."""

    logits: Float[Tensor, "rows vocab"]


@dataclass(frozen=True)
class Hidden:
    """Last hidden states and the head that turns them into logits: exact, and 37 to 74 times smaller than logits."""

    hidden: Float[Tensor, "rows hidden"]
    head: Head


@dataclass(frozen=True)
class TopK:
    """The k most probable tokens, with what is left as one bucket.

    Attributes:
        ids: distinct token ids of each row.
        log_probs: their natural log-probabilities under the full softmax at temperature 1 (not renormalised).
    """

    ids: Int[Tensor, "rows k"]
    log_probs: Float[Tensor, "rows k"]


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
class LogProbs:
    """The teacher's natural log-probabilities of the tokens that the text has: no distribution to compare with."""

    log_probs: Float[Tensor, "rows"]


Signal = Dense | Hidden | TopK | Sampled | LogProbs
