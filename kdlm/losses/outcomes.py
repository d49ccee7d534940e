"""Outcomes: what two models with different vocabularies can both say of the next token, and losses over that.

Both logits are brought to distributions over the same outcomes; any token loss compares them there. Outcomes are
tokens that both have (`Matched`), or tokens of the teacher to which the student's are projected (`Projected`) or the
other way round (`Turned`), and one more for all the rest.
"""

from dataclasses import dataclass, fields, replace
from typing import ClassVar, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kdlm.losses.distributions import log_probs, widen
from kdlm.losses.loss import Loss, TeacherRows
from kdlm.signal import IGNORE_INDEX, TopK


@dataclass(frozen=True)
class Matched:
    """The tokens that both vocabularies have, one to one, and the rest of either as one more outcome.

    Where one side has no other tokens there is no such outcome, and the other side is normalised over what is matched.
    Rows of a head beyond the tokens are padding and count for nothing.

    Attributes:
        ids, others: the student's ids that are matched, in the order of the outcomes, and all the others.
        their_ids, their_others: the same of the teacher.
        places: of each of the student's ids, its outcome, or IGNORE_INDEX.
        their_places: of each of the teacher's ids, its outcome, or a number beyond all of them.
        rest: whether the rest is compared at all; without it both sides are normalised over what is matched.
    """

    ids: Int[Tensor, "single"]
    others: Int[Tensor, "others"]
    their_ids: Int[Tensor, "outcomes"]
    their_others: Int[Tensor, "their_others"]
    places: Int[Tensor, "vocab"]
    their_places: Int[Tensor, "their_vocab"]
    rest: bool

    @classmethod
    def of(
        cls,
        ids: Int[Tensor, "pairs"],
        their_ids: Int[Tensor, "pairs"],
        vocab: int,
        their_vocab: int,
        *,
        rest: bool = True,
    ) -> Self:
        """Make the outcomes of pairs of ids and the number of tokens on both sides; pairs beyond it are left out."""
        inside = (ids < vocab) & (their_ids < their_vocab)
        return cls(**_sides(ids[inside], their_ids[inside], vocab, their_vocab), rest=rest)

    def to(self, device: torch.device) -> Self:
        """Return the outcomes on a device; itself where they are there."""
        if self.ids.device == device:
            return self
        tensors = {f.name: value for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor)}
        return replace(self, **{name: tensor.to(device) for name, tensor in tensors.items()})

    @property
    def both(self) -> bool:
        """Whether both sides have mass that may be on the outcome of the rest."""
        return self.rest and self.loses and len(self.their_others) > 0

    @property
    def loses(self) -> bool:
        """Whether some of the student's mass is on no outcome."""
        return len(self.others) > 0

    def ours(
        self, logits: Float[Tensor, "*rows vocab"], temperature: float, rest: bool
    ) -> Float[Tensor, "*rows outcomes"]:
        """Return the student's logits over the outcomes, exact at this temperature; the last is that of the rest."""
        return _coarse(logits, self.ids, self.others if rest else None, temperature)

    def theirs(
        self, logits: Float[Tensor, "*rows their_vocab"], temperature: float, rest: bool
    ) -> Float[Tensor, "*rows outcomes"]:
        """Return the teacher's."""
        return _coarse(logits, self.their_ids, self.their_others if rest else None, temperature)

    def few(self, teacher: TopK) -> TopK:
        """Return a teacher's k tokens as outcomes. Those that are none have an id beyond them: they count as rest."""
        known = teacher.ids < len(self.their_places)
        places = self.their_places[teacher.ids.where(known, 0)]
        return TopK(places.where(known, len(self.their_ids) + 1), teacher.log_probs)


@dataclass(frozen=True)
class Projected(Matched):
    """The teacher tokens to which a sparse matrix M leads the student's: `P = q M`, compared with p (NeMo-RL, X-token).

    The rest is, on the student's side, the mass that M leads nowhere (the sink); on the teacher's, that of tokens to
    which it does not lead. `ids` are the student's tokens that alone lead to an outcome, the first ones, with weight
    `exp(log_weights)`; the other outcomes, and the sink behind them, are rows of `matrix`.
    """

    log_weights: Float[Tensor, "single"]
    matrix: Float[Tensor, "several vocab"]
    """Sparse. Its last row is what each of the student's tokens loses."""

    @classmethod
    def by(
        cls,
        rows: Int[Tensor, "entries"],
        columns: Int[Tensor, "entries"],
        weights: Float[Tensor, "entries"],
        vocab: int,
        their_vocab: int,
    ) -> Self:
        """Make the outcomes of M's entries (student id, teacher id, weight) and the number of tokens on both sides.

        Raises ValueError where a weight is negative or a row adds up to more than 1.
        """
        inside = (rows < vocab) & (columns < their_vocab)
        rows, columns, weights = rows[inside], columns[inside], weights[inside]
        lost = 1 - weights.new_zeros(vocab).index_add(0, rows, weights)
        if bool((weights < 0).any()) or bool((lost < -1e-6).any()):
            raise ValueError("the weights of a projection must not be negative, and those of a row add up to at most 1")
        counts = torch.bincount(columns, minlength=their_vocab)
        alone = counts[columns] == 1
        several = (counts > 1).nonzero()[:, 0]
        place = torch.zeros_like(counts).index_put((several,), torch.arange(len(several)))
        losing = (lost > 1e-6).nonzero()[:, 0]
        index = torch.stack(
            [
                torch.cat([place[columns[~alone]], torch.full_like(losing, len(several))]),
                torch.cat([rows[~alone], losing]),
            ]
        )
        values = torch.cat([weights[~alone], lost[losing]])
        matrix = torch.sparse_coo_tensor(index, values, (len(several) + 1, vocab), check_invariants=True).coalesce()
        sides = _sides(rows[alone], torch.cat([columns[alone], several]), vocab, their_vocab)
        sides["others"] = losing
        sides["places"] = torch.full((vocab,), IGNORE_INDEX)
        sure = weights == 1
        sides["places"][rows[sure]] = sides["their_places"][columns[sure]]
        return cls(**sides, rest=True, log_weights=weights[alone].log(), matrix=matrix)

    def ours(
        self, logits: Float[Tensor, "*rows vocab"], temperature: float, rest: bool
    ) -> Float[Tensor, "*rows outcomes"]:
        log_q = log_probs(logits[..., : len(self.places)], temperature)
        parts = [log_q.index_select(-1, self.ids) + self.log_weights.to(log_q.dtype)]
        several = len(self.matrix) - 1
        if several or rest:
            mass = torch.sparse.mm(self.matrix.to(log_q.dtype), log_q.exp().flatten(0, -2).T).T
            mass = mass.unflatten(0, log_q.shape[:-1])[..., : several + rest]
            parts.append(mass.clamp(min=torch.finfo(mass.dtype).tiny).log())
        return torch.cat(parts, dim=-1) * temperature


@dataclass(frozen=True)
class Turned:
    """A projection the other way: the teacher's probabilities are carried to the student's tokens, `p M`.

    Attributes:
        of: the outcomes of a projection whose `ours` is the teacher's side.
    """

    of: Projected

    def to(self, device: torch.device) -> Self:
        """Return the outcomes on a device."""
        return replace(self, of=self.of.to(device))

    @property
    def both(self) -> bool:
        """Whether both sides have mass that may be on the outcome of the rest."""
        return self.of.both

    @property
    def places(self) -> Int[Tensor, "vocab"]:
        """Of each of the student's ids, its outcome, or IGNORE_INDEX."""
        return self.of.their_places.where(self.of.their_places < len(self.of.their_ids), IGNORE_INDEX)

    def ours(
        self, logits: Float[Tensor, "*rows vocab"], temperature: float, rest: bool
    ) -> Float[Tensor, "*rows outcomes"]:
        """Return the student's logits over the outcomes."""
        return self.of.theirs(logits, temperature, rest)

    def theirs(
        self, logits: Float[Tensor, "*rows their_vocab"], temperature: float, rest: bool
    ) -> Float[Tensor, "*rows outcomes"]:
        """Return the teacher's."""
        return self.of.ours(logits, temperature, rest)


def _sides(ids: Tensor, their_ids: Tensor, vocab: int, their_vocab: int) -> dict[str, Tensor]:
    """Return what `Matched` knows of both sides, whose outcomes are numbered in the order of `their_ids`."""
    place, their_place = torch.full((vocab,), IGNORE_INDEX), torch.full((their_vocab,), len(their_ids) + 1)
    place[ids] = torch.arange(len(ids))
    their_place[their_ids] = torch.arange(len(their_ids))
    return {
        "ids": ids,
        "others": (place == IGNORE_INDEX).nonzero()[:, 0],
        "their_ids": their_ids,
        "their_others": (their_place > len(their_ids)).nonzero()[:, 0],
        "places": place,
        "their_places": their_place,
    }


def _coarse(logits: Tensor, ids: Tensor, others: Tensor | None, temperature: float) -> Tensor:
    scaled = widen(logits) / temperature
    kept = scaled.index_select(-1, ids)
    if others is not None and len(others):
        kept = torch.cat([kept, scaled.index_select(-1, others).logsumexp(-1, keepdim=True)], dim=-1)
    return kept * temperature


@dataclass(frozen=True)
class OnOutcomes:
    """A token loss over outcomes, as a term of `weighted_sum`: gets the whole logits of both."""

    full_vocabulary: ClassVar[bool] = True

    loss: Loss
    outcomes: Matched | Turned

    def __call__(
        self, student: Float[Tensor, "rows vocab"], teacher: TeacherRows, labels: Int[Tensor, "rows"]
    ) -> Float[Tensor, "rows"]:
        at = self.outcomes.places[labels]
        if isinstance(teacher, TopK):
            assert isinstance(self.outcomes, Matched)
            return self.loss(self.outcomes.ours(student, 1.0, self.outcomes.loses), self.outcomes.few(teacher), at)
        assert isinstance(teacher, Tensor)
        temperature, rest = getattr(self.loss, "temperature", 1.0), self.outcomes.both
        ours = self.outcomes.ours(student, temperature, rest)
        return self.loss(ours, self.outcomes.theirs(teacher, temperature, rest), at)
