"""Several teachers as one: their distributions averaged, by weights that are fixed, routed, or learned."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from kdlm.models.prediction import head
from kdlm.section import Section
from kdlm.signal import Dense, Head, Hidden, Mixture, Rows, domain_id, sequence_of
from kdlm.teachers.fitting import (
    HeldOut,
    expectation_maximisation,
    geometric_cross_entropy,
    geometric_weights,
    label_log_probs,
)
from kdlm.teachers.local import LocalTeacher, own_reading
from kdlm.teachers.weights import ByDomain, Confidence, Learned, Weights, check_weights, log_shares

Batch = dict[str, Any]


class Ensemble:
    """Averages what several teachers say, position by position.

    A member whose weight is 0 for every sequence of a batch is not asked. Members whose heads have different numbers
    of rows are cut to the fewest.

    Args:
        members: teachers that give whole distributions, with one tokenizer.
        weights: one number per member (their ratios count), or a rule; None weighs all alike.
        space: average probabilities, or their logarithms (a geometric mean, normalised: where one member rules a token
            out, so does the mean).
        resident: `one` keeps local members on the CPU and moves each to the device for its own forward only. Heads stay
            on the device until the losses have read them.

    Raises ValueError for weights that do not fit the members, and members that cannot move where one is to be resident.
    """

    provides = frozenset({"teacher"})

    def __init__(
        self,
        members: Sequence[Any],
        weights: Weights | Sequence[float] | None = None,
        *,
        space: Literal["probability", "log"] = "probability",
        resident: Literal["all", "one"] = "all",
    ):
        if not isinstance(weights, Section | None):
            weights = [float(weight) for weight in weights]
        self.members, self.weights, self.resident = list(members), weights, resident
        self.space: Literal["probability", "log"] = space
        if not self.members:
            raise ValueError("an ensemble needs at least one member")
        check_weights(weights, len(self.members))
        stuck = [i for i, m in enumerate(self.members) if not getattr(m, "moves", False)]
        if resident == "one" and stuck:
            raise ValueError(f"resident: one: members.{stuck[0]} cannot be moved; use resident: all")
        self._fixed = None  # log weights [members], in float64
        if not isinstance(weights, ByDomain | Learned):
            numbers = weights if isinstance(weights, list) else [1.0] * len(self.members)
            self._fixed = log_shares(numbers, len(self.members))
        self._table = {}
        if isinstance(weights, ByDomain):
            self._table = {domain_id(name): log_shares(row, len(row)) for name, row in weights.table.items()}
        self._head: Head | None = None
        if any(hasattr(member, "prefetch") for member in self.members):
            self.prefetch = self._prefetch  # only then is the batch made to wait for it

    @property
    def in_shards(self) -> bool:
        """Whether all ranks must ask it at the same time."""
        return any(getattr(member, "in_shards", False) for member in self.members)

    @property
    def signals(self) -> frozenset[type]:
        """The kind of signal it answers with."""
        return frozenset({Hidden if self._joins else Mixture})

    @property
    def vocab_size(self) -> int | None:
        """The fewest ids that a member scores, None where no member knows."""
        known = [member.vocab_size for member in self.members if getattr(member, "vocab_size", None) is not None]
        return min(known, default=None)

    @torch.no_grad()
    def __call__(self, batch: Batch, rows: Rows) -> Mixture | Hidden:
        """Return the average at the kept rows.

        Raises ValueError where a member gives no whole distribution, weights are learned and not fitted yet, or a
        sequence's domain is not known.
        """
        if "theirs" in batch:
            batch, rows = own_reading(batch, rows)
        shares = self._shares(batch)
        joins = self._joins
        together = [
            joins or getattr(member, "in_shards", False) for member in self.members
        ]  # on every rank, or on none
        wanted = [i for i, always in enumerate(together) if always or not shares[:, i].isneginf().all()]
        signals = self._ask(wanted, batch, rows)
        wide = torch.float64 if any(_values(s).dtype == torch.float64 for s in signals) else torch.float32
        shares = shares[:, wanted].to(rows.index.device, wide)
        which = rows.index.new_zeros(len(rows)) if len(shares) == 1 else rows.select(sequence_of(batch))
        log_weights = shares.index_select(0, which)
        if joins:
            return self._joined([s for s in signals if isinstance(s, Hidden)], log_weights)
        confidence = self.weights.temperature if isinstance(self.weights, Confidence) else None
        return Mixture(tuple(signals), log_weights, self.space, confidence)

    def to(self, device: torch.device) -> "Ensemble":
        """Move the members that can move: to the device, or to where they wait for their turn."""
        for member in self.members:
            if isinstance(member, LocalTeacher):
                member.to(device if self.resident == "all" else torch.device("cpu"))
        return self

    def require(self, rows: Any) -> None:
        """Raise ValueError where the rows hold what a member cannot answer, or a domain without weights."""
        for member in self.members:
            if hasattr(member, "require"):
                member.require(rows)
        if isinstance(self.weights, ByDomain) and hasattr(rows, "column_names"):
            if "domain" not in rows.column_names:
                raise ValueError("teacher.weights: by_domain needs rows with a column `domain` (kdlm.signal.domain_id)")
            for domain in _distinct(rows):
                self._of_domain(domain)

    def close(self) -> None:
        """Tell every member that the run is over."""
        for member in self.members:
            if hasattr(member, "close"):
                member.close()

    # Learned weights

    @property
    def needs_fit(self) -> bool:
        """Whether the weights are to be learned and are not yet."""
        return self._fixed is None and isinstance(self.weights, Learned)

    @torch.no_grad()
    def fit(self, batches: Iterable[tuple[Batch, Rows]], vocab: int | Tensor | None = None) -> None:
        """Fit the weights on held-out batches; `vocab` are the ids that all tokenizers share (see `chunked`).

        Raises ValueError where the batches have no kept row.
        """
        assert isinstance(self.weights, Learned), "only learned weights are fitted"
        pieces, seen = [], 0
        for batch, rows in batches:
            left = self.weights.positions - seen
            if left <= 0:
                break
            if "theirs" in batch:
                batch, rows = own_reading(batch, rows)
            rows = Rows(rows.index[:left], rows.labels[:left])
            signals = self._ask(range(len(self.members)), batch, rows)
            if pieces and self.space == "log":  # the head of a member that was moved anew is another copy: keep one
                signals = [_with_head_of(a, b) for a, b in zip(signals, pieces[0].signals, strict=True)]
            piece = HeldOut(signals, rows.labels)
            # Logarithms of labels are all that a mean of probabilities needs; hidden states need not be kept.
            pieces.append(piece if self.space == "log" else label_log_probs(piece, vocab))
            seen += len(rows)
        if not seen:
            raise ValueError("teacher.weights: learned: the evaluation rows hold no position to fit the weights on")
        if self.space == "log":
            fitted = geometric_weights(lambda w: geometric_cross_entropy(pieces, vocab, w), len(self.members))
        else:
            fitted, _ = expectation_maximisation(torch.cat(pieces))
        self._fixed = fitted.cpu()

    def readings(self) -> dict[str, float]:
        """Return the learned weights, for the log."""
        learned = self.state_dict().get("log_weights", torch.zeros(0))
        return {f"teacher_weight/{number}": weight for number, weight in enumerate(learned.exp().tolist())}

    def state_dict(self) -> dict[str, Tensor]:
        """Return the learned weights, for checkpoints."""
        return {} if self._fixed is None or not isinstance(self.weights, Learned) else {"log_weights": self._fixed}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take back what `state_dict` gave. Raises ValueError where the number of members has changed."""
        if "log_weights" in state:
            if len(state["log_weights"]) != len(self.members):
                raise ValueError(f"{len(state['log_weights'])} learned weights for {len(self.members)} members")
            self._fixed = state["log_weights"].cpu()

    # What a batch needs

    def _prefetch(self, batch: Batch) -> list[Any]:
        return [member.prefetch(batch) if hasattr(member, "prefetch") else None for member in self.members]

    def _ask(self, wanted: Iterable[int], batch: Batch, rows: Rows) -> list[Hidden | Dense]:
        """Return the members' signals, over equally many ids."""
        common = {key: value for key, value in batch.items() if key != "teacher"}
        signals = []
        for number in wanted:
            member = self.members[number]
            own = common
            if hasattr(member, "prefetch") and "teacher" in batch:
                own = common | {"teacher": batch["teacher"][number]}
            with self._on(rows.index.device, member):
                signal = member(own, rows)
                if not isinstance(signal, Hidden | Dense):
                    raise ValueError(
                        f"teacher.members.{number}: a {type(signal).__name__} signal; an ensemble averages whole "
                        "distributions (Hidden or Dense)"
                    )
                signals.append(_held(signal))
        sizes = [signal.vocab_size for signal in signals]
        least = min([*sizes, *([self.vocab_size] if self.vocab_size is not None else [])])
        return [signal.cut(least) for signal in signals]

    @contextmanager
    def _on(self, device: torch.device, member: Any) -> Iterator[None]:
        if self.resident == "all":
            yield
            return
        member.to(device)
        try:
            yield
        finally:
            member.to(torch.device("cpu"))

    def _shares(self, batch: Batch) -> Float[Tensor, "sequences members"]:
        """Return log weights of every sequence of the batch, or one row for all of them; on the CPU."""
        if self._fixed is not None:
            return self._fixed[None]
        if isinstance(self.weights, Learned):
            raise ValueError("teacher.weights: learned, and not fitted yet: call fit(batches) first")
        if "domain" not in batch:
            raise ValueError("teacher.weights: by_domain needs a batch with `domain`, one number per sequence")
        return torch.stack([self._of_domain(domain) for domain in batch["domain"].tolist()])

    def _of_domain(self, domain: int) -> Float[Tensor, "members"]:
        assert isinstance(self.weights, ByDomain)
        if domain in self._table:
            return self._table[domain]
        if self.weights.default is None:
            raise ValueError(
                "teacher.weights.table: there are rows of a domain that it does not name (it names "
                f"{', '.join(self.weights.table)}): name it, or set teacher.weights.default"
            )
        return log_shares(self.weights.default, len(self.members))

    # A geometric mean is one linear head

    @property
    def _joins(self) -> bool:
        """Whether the mean of log-probabilities is exactly one head over all hidden states side by side."""
        return (
            self.space == "log"
            and not isinstance(self.weights, Confidence)
            and all(
                isinstance(m, LocalTeacher)
                and m.signals == {Hidden}
                and head(m.model).softcap is None
                and head(m.model).group is None
                for m in self.members
            )
        )

    def _joined(self, signals: Sequence[Hidden], log_weights: Float[Tensor, "rows members"]) -> Hidden:
        """Return `softmax(sum_i w_i z_i)` as hidden states times weights, side by side, and one wide head.

        The heads are frozen and copied once. Weights multiply hidden states in their own dtype.
        """
        hidden, heads = [], []
        for number, signal in enumerate(signals):
            factor = log_weights[:, number, None].exp() * signal.head.logit_scale
            hidden.append(signal.hidden * factor.to(signal.hidden.dtype))
            heads.append(signal.head.weight)
            if signal.head.bias is not None:  # a column of its own, since weights may differ from row to row
                hidden.append(factor.to(signal.hidden.dtype))
                heads.append(signal.head.bias[:, None])
        if self._head is None:
            self._head = Head(torch.cat(heads, 1))
        return Hidden(torch.cat(hidden, 1), self._head)


def _values(signal: Hidden | Dense) -> Tensor:
    return signal.hidden if isinstance(signal, Hidden) else signal.logits


def _with_head_of(signal: Hidden | Dense, other: Hidden | Dense) -> Hidden | Dense:
    both = isinstance(signal, Hidden) and isinstance(other, Hidden)
    return Hidden(signal.hidden, other.head) if both else signal


def _held(signal: Hidden | Dense) -> Hidden | Dense:
    """Return the signal with the head's tensors of this moment: a module that moves gives its parameters new ones."""
    return signal if isinstance(signal, Dense) else Hidden(signal.hidden, signal.head.detach())


def _distinct(rows: Any) -> list[int]:
    """Return the domains that occur in a data set, whose rows are sequences or packs of them."""
    import pyarrow as pa
    import pyarrow.compute as pc

    column = rows.with_format("arrow")["domain"][:]
    nested = pa.types.is_list(column.type) or pa.types.is_large_list(column.type)
    return pc.unique(pc.list_flatten(column) if nested else column).to_pylist()
