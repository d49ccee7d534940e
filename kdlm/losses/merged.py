"""GOLD: a group of tokens on either side, merged into one distribution, and the two compared.

A group is a span of text that both tokenizers begin and end alike, of one or several tokens each. Its merged row is the
distribution at one of its positions times the probabilities of the text's own tokens at the others, so that the
observed continuation has the probability of the whole group. Of several tokens it adds up to less than 1: what is left
is that the group reads otherwise.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from kdlm_kernels.row_part import Impl
from torch import Tensor

from kdlm.losses.distributions import log_probs
from kdlm.losses.jsd import generalised_jsd
from kdlm.losses.outcomes import Matched
from kdlm.losses.sorted_l1 import masses_l1
from kdlm.losses.sweep import sweep
from kdlm.losses.truncated import with_tail
from kdlm.signal import Dense, Hidden


@dataclass(frozen=True)
class Hybrid:
    """How GOLD compares two merged rows: a divergence on what both vocabularies have, sorted L1 on the rest.

    Attributes:
        matched: the tokens that both have.
        matched_weight, unmatched_weight: of the two parts.
        beta: of the generalised JSD (see `generalised_jsd`).
        temperature: divides the logits of both; there is no `T^2`.
    """

    matched: Matched
    matched_weight: float
    unmatched_weight: float
    beta: float = 0.5
    temperature: float = 1.0

    def parts(
        self,
        student: Float[Tensor, "rows vocab"],
        teacher: Float[Tensor, "rows their_vocab"],
        ours: Float[Tensor, "rows"],
        theirs: Float[Tensor, "rows"],
    ) -> tuple[Float[Tensor, "rows"], Float[Tensor, "rows"]]:
        """Return the generalised JSD and the sorted L1 of each pair of merged rows.

        `ours` and `theirs` are the log-probabilities of the groups' other tokens, 0 where a group has none.

        The JSD is between distributions: the merged row on the matched ids, and all that it leaves (other ids, other
        readings of the group) as one more outcome. TRL compares the matched masses alone, which add up to less than 1:
        a term less, and a value that may be below 0 at `beta` 0 or 1. The two agree where all ids are matched and
        groups have one token. The L1 is that of the masses, as in TRL.
        """
        of = self.matched
        log_q = log_probs(student[:, : len(of.places)], self.temperature)
        log_p = log_probs(teacher[:, : len(of.their_places)].detach().to(log_q.dtype), self.temperature)
        log_q, log_p = log_q + ours[:, None].to(log_q.dtype), log_p + theirs[:, None].to(log_p.dtype)
        if not len(of.ids):
            return log_q.sum(-1) * 0, masses_l1(log_q.exp(), log_p.exp())
        jsd = generalised_jsd(
            with_tail(log_q.index_select(-1, of.ids)), with_tail(log_p.index_select(-1, of.their_ids)), beta=self.beta
        )
        if not len(of.others) and not len(of.their_others):
            return jsd, torch.zeros_like(jsd)
        return jsd, masses_l1(log_q.index_select(-1, of.others).exp(), log_p.index_select(-1, of.their_others).exp())


def merged_divergence(
    student: Hidden | Dense,
    teacher: Hidden | Dense,
    ours: Float[Tensor, "rows"],
    theirs: Float[Tensor, "rows"],
    hybrid: Hybrid,
    *,
    chunk_rows: int | None = None,
    impl: Impl = "auto",
) -> tuple[Float[Tensor, "rows"], dict[str, Float[Tensor, "rows"]]]:
    """Return the hybrid loss of each group, and its parts `jsd` and `sorted_l1` without gradient.

    `student` and `teacher` are what they say at the position of each group at which it is merged. Differentiable in
    the student's signal and in `ours`, in the memory of one chunk of rows.
    """

    def of_rows(
        z: Tensor, y: Tensor, own: Tensor, other: Tensor
    ) -> tuple[Float[Tensor, "n"], dict[str, Float[Tensor, "n"]]]:
        graded = torch.is_grad_enabled()
        own = own.detach().requires_grad_(graded)
        jsd, l1 = hybrid.parts(z, y, own, other)
        value = hybrid.matched_weight * jsd + hybrid.unmatched_weight * l1
        slope = torch.autograd.grad(value.sum(), own, retain_graph=True)[0] if graded else torch.zeros_like(own)
        return value, {"jsd": jsd, "sorted_l1": l1, "slope": slope}

    options = {"vocab": None, "has_aux": True, "chunk_rows": chunk_rows, "impl": impl}
    value, parts = sweep(of_rows, student, teacher, ours.detach(), theirs.detach(), **options)
    if not parts:  # no rows
        return value, {name: value.detach() for name in ("jsd", "sorted_l1")}
    # The sweep is blind to the gradient of what comes with the rows: a term of value 0 carries it.
    slope = parts.pop("slope")
    return value + slope * (ours - ours.detach()), parts
