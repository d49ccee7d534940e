"""GDSD: a masked diffusion language model learns from rewards by distilling from its own reweighted past."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from kdlm.losses import Loss, token_log_probs
from kdlm.methods.masked.masking import Masked, MaskedMethod, Texts, masked
from kdlm.methods.method import Batch, Nets, Step, Term, Terms
from kdlm.methods.rewards import group_advantages
from kdlm.methods.tokens import TokenOptions
from kdlm.roles import Role, SnapshotOf, Trainable
from kdlm.signal import summed


class GDSD(MaskedMethod):
    """Guided denoiser self-distillation (arXiv 2605.29398): no likelihood ratio is multiplied, a score is matched.

    The score `s(y)` of a completion is the sum of the log-probabilities of its hidden tokens, L of them, under a random
    mask; the student's, that of the weights that wrote the text and that of a reference are taken under the same masks.
    In mean over completions and masks the loss is

        (clamp(s - s_old, log(1 - e), log(1 + e)) / L - psi A)^2 + b k2,

    A being the reward less the mean of the others of its group, not divided by their spread, and k2 half the squared
    difference of log-probabilities to the reference, in mean over the hidden tokens. At s = s_old the first term's
    gradient is `-2 psi A grad s / L`; outside of the narrow band it has none: `active` is the share inside.

    Loss, defaults and the refreshed reference are from a description of the released code, which was not read; k2 in
    mean over tokens is our reading. Its second variant (logits less their mean, divided by the probability of a mask)
    is not here.

    Args:
        psi: scale of the advantages.
        clip: e.
        kl_weight: b; 0 keeps no reference.
        masks: how many are drawn for a completion, each a pass of its own.
        complementary: draw them in pairs that together hide every token once.
        inner_steps: optimiser steps on one generation of text, `every * reuse` of the rollouts: the weights of before
            the first of them wrote it. With 1 they are the student's own, and nothing is clamped.
        reference_every: optimiser steps after which the reference becomes the student of then.
    """

    paper = "arXiv 2605.29398"
    needs = frozenset({"rollouts", "reward", "unmasking"})
    weighs = True

    def __init__(
        self,
        losses: Sequence[Loss] = (),
        *,
        psi: float = 1.0,
        clip: float = 4e-4,
        kl_weight: float = 1e-3,
        masks: int = 4,
        complementary: bool = True,
        inner_steps: int = 8,
        reference_every: int = 64,
        **options: Any,
    ):
        super().__init__(losses, **options)
        if losses:
            raise ValueError("losses: gdsd brings its own: remove the section")
        self.psi, self.kl_weight, self.masks, self.complementary = psi, kl_weight, masks, complementary
        self.band = math.log1p(-clip), math.log1p(clip)
        self.inner_steps, self.reference_every = inner_steps, reference_every

    @property
    def roles(self) -> dict[str, Role]:
        roles: dict[str, Role] = {"student": Trainable()}
        if self.kl_weight:
            roles["reference"] = SnapshotOf("student", lambda done: done % self.reference_every == 0)
        if self.inner_steps > 1:
            roles["old"] = SnapshotOf("student", lambda done: done % self.inner_steps == 0)
        return roles

    def text(self, step: Step, draw: float) -> Literal["data", "student", "both"]:
        return "student"

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Count trained tokens, and masks that hide any; the complement of a single token's mask does not."""
        texts = Texts.of(batch)
        sizes, weight = texts.sizes, texts.weight
        pairs = self.masks // 2 if self.complementary else 0
        scored = (self.masks - pairs) * summed(sizes > 0, weight) + pairs * summed(sizes > 1, weight)
        return {"tokens": summed(sizes, weight), "masks": scored}

    def drawn(self, texts: Texts, step: Step) -> list[Tensor]:
        """Return which tokens each mask of a step hides, `[texts, length]`; of a pair the second hides the rest."""
        if not self.complementary:
            return [texts.hidden(step.seed, step.index, f"mask {number}") for number in range(self.masks)]
        pairs = range(self.masks // 2)
        firsts = [texts.hidden(step.seed, step.index, f"mask {number}", spare=1) for number in pairs]
        return [hidden for first in firsts for hidden in (first, texts.trained & ~first)]

    def losses(self, nets: Nets, batch: Batch, active: frozenset[str], step: Step) -> Iterator[Terms]:
        texts = Texts.of(batch)
        advantages = group_advantages(batch["reward"], batch["index"], leave_one_out=True)
        masks = self.drawn(texts, step)
        for number, hidden in enumerate(masks):
            seen = masked(texts, hidden, nets["student"].mask_id)
            yield self._matched(nets, seen, advantages, more=number + 1 < len(masks))

    def _matched(self, nets: Nets, seen: Masked, advantages: Tensor, *, more: bool) -> Terms:
        """Return the terms of one mask, each a sum over the texts of which it hides something."""
        log_q = self._log_probs(nets["student"], seen)
        with torch.no_grad():
            old = self._log_probs(nets["old"], seen) if "old" in nets else log_q.detach()
        size, scored = seen.hidden.clamp(min=1), seen.hidden > 0
        gap = seen.by_text(log_q - old)
        low, high = self.band
        errors = (gap.clamp(low, high) / size - self.psi * advantages.to(gap)).square()
        inside = (low <= gap) & (gap <= high)
        terms = {"guidance": Term(summed(errors * scored, seen.weight), "masks")}
        if "reference" in nets:
            with torch.no_grad():
                reference = self._log_probs(nets["reference"], seen)
            apart = seen.by_text((log_q - reference).square() / 2) / size
            terms["reference_k2"] = Term(summed(apart, seen.weight), "masks", self.kl_weight)
        metrics = {"active": inside & scored, "score_gap": gap.detach().abs() * scored}
        sums = {name: (summed(value, seen.weight), "masks") for name, value in metrics.items()}
        return Terms(terms, sums, more=more)

    def _log_probs(self, net: Any, seen: Masked) -> Tensor:
        signal = net(seen.batch, seen.rows)
        return token_log_probs(signal, seen.rows.labels, chunk_rows=self.chunk_rows, impl=self.impl)[0]


class GDSDSection(TokenOptions):
    """Follow rewards of the student's own completions by matching its own reweighted past; for masked models."""

    method: ClassVar = GDSD
    name: Literal["gdsd"] = "gdsd"
    psi: float = Field(1.0, gt=0)
    """Scale of the advantages; the paper has 10 for mathematics."""
    clip: float = Field(4e-4, gt=0, lt=1)
    """Half the width of the band, in nats of a completion's score, in which the student leaves the weights that wrote
    the text."""
    kl_weight: float = Field(1e-3, ge=0)
    """Weight of the pull to the reference; 0 keeps none."""
    masks: int = Field(4, ge=1)
    """Masks drawn for each completion and step."""
    complementary: bool = True
    """Draw masks in pairs that together hide every token once: less variance."""
    inner_steps: int = Field(8, ge=1)
    """Optimiser steps that train on the same completions: `every * reuse` of `rollouts`."""
    reference_every: int = Field(64, ge=1)
    """Optimiser steps after which the reference is taken anew."""

    @model_validator(mode="after")
    def _in_pairs(self) -> "GDSDSection":
        if self.complementary and self.masks % 2:
            raise ValueError(f"masks: {self.masks} are not pairs: use an even number, or complementary: false")
        return self
