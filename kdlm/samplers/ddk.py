"""DDK: shares of the domains that follow how far the student is behind its teacher in each (arXiv 2407.16154)."""

from collections.abc import Mapping
from itertools import islice, repeat
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from kdlm.data.mixing import held_out, mixed
from kdlm.samplers.order import Order, column, permutation
from kdlm.section import Section

FARTHEST = 700.0
"""Largest difference in nats whose exponential is still a number."""


class DomainGaps(Section):
    """Draw more from the domains in which the student is farthest behind its teacher (DDK, arXiv 2407.16154).

    Every so many steps, r_i becomes (1 - s) psi_i / sum psi + s / N with psi_i = r_i exp(PPL_student / PPL_teacher), on
    rows of each of the N domains that are not trained on. It begins with a measurement, from even shares.
    """

    name: Literal["ddk"] = "ddk"
    every: int = Field(1000, ge=1)
    """Optimiser steps between two measurements. So many are an epoch of the run, which `training.max_steps` ends."""
    smoothing: float = Field(0.5, ge=0, le=1)
    """Part of the shares that is spread evenly over the domains, s above; the paper's alpha is 1 - s. Without it shares
    drift apart, since each builds on the one before."""
    held_out: int = Field(500, ge=1)
    """Sequences of each domain that are measured, and not trained on; whole documents are held out for them."""
    seed: int = 0
    """Which rows are held out. Not the run's seed, so that runs of different seeds share them."""

    def order(
        self, rows: Any, seed: int, per_step: int, documents: Int[np.ndarray, "sequences"] | None = None
    ) -> "DomainOrder":
        """Return the order of these rows.

        Args:
            per_step: rows of an optimiser step, on all ranks.
            documents: of which document the sequence of each `index` is a piece; by default each is one of its own.

        Raises ValueError where the rows have no domains, or one of them is too small.
        """
        try:
            domains = column(rows, "domain")
        except ValueError as error:
            raise ValueError(f"sampler: ddk asks of every row which domain it is of: {error}") from error
        keys = np.arange(len(rows)) if documents is None else documents[column(rows, "index")]
        numbers = np.unique(domains)
        if len(numbers) < 2:
            raise ValueError(
                "sampler: all rows are of one domain, and ddk weighs several: give each source a `domain`, or map a "
                "column to it"
            )
        slices, pools = {}, {}
        for number in numbers.tolist():
            of_it = np.flatnonzero(domains == number)
            slices[number], pools[number] = _split(of_it, keys[of_it], self.held_out, self.seed)
        return DomainOrder(slices, pools, per_step, self.every, seed, self.smoothing)


def _split(
    places: Int[np.ndarray, "rows"], keys: Int[np.ndarray, "rows"], count: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return so many rows to measure, and the rows of all documents that none of them is of."""
    documents, most = 0, len(np.unique(keys)) - 1  # a document may be many sequences
    out = np.zeros(len(keys), dtype=bool)
    while (found := int(out.sum())) < count:
        if documents == most:
            raise ValueError(
                f"sampler.held_out: {count} of a domain of {len(places)} sequences, which are of {most + 1} documents, "
                "leaves none to train on: take fewer"
            )
        documents = min(most, documents + max(1, (count - found) * documents // max(1, 2 * found)))
        out = held_out(keys, documents, seed)
    return places[out][:count], places[~out]


class DomainOrder(Order):
    """Epochs of `every` steps, whose rows come from the domains by the shares of their beginning, evenly spread.

    A domain's rows are walked through in a permutation, and in another one when they are used up.

    Attributes:
        slices: domain -> places of the rows that are measured.
        pools: domain -> places of the rows that are trained on.
        shares: share of each domain in the epoch that is being drawn, in the order of `pools`.
        taken: samples that all epochs before it took of each domain.
        teacher: nats a token of the teacher on each domain's slice; None before it was measured.
    """

    def __init__(
        self,
        slices: Mapping[int, Int[np.ndarray, "rows"]],
        pools: Mapping[int, Int[np.ndarray, "rows"]],
        per_step: int,
        every: int,
        seed: int,
        smoothing: float,
    ):
        super().__init__(per_step * every)
        self.slices, self.pools, self.seed, self.smoothing = slices, pools, seed, smoothing
        self.per_step, self.every = per_step, every
        self.shares = np.full(len(pools), 1 / len(pools))
        self.taken = np.zeros(len(pools), dtype=np.int64)
        self.teacher: np.ndarray | None = None
        self.passed = 0

    def rows(self, epoch: int) -> Int[np.ndarray, "size"]:
        if epoch != self.passed:
            raise ValueError(f"sampler: epoch {epoch} is asked for with the shares of epoch {self.passed}")
        which = self.plan()
        rows = np.empty(self.size, dtype=np.int64)
        for place, (number, pool) in enumerate(self.pools.items()):
            rows[which == place] = self._walked(number, pool, self.taken[place], int((which == place).sum()))
        return rows

    def plan(self) -> Int[np.ndarray, "size"]:
        """Return which domain, in the order of `pools`, each sample of the present epoch is of."""
        some = [place for place, share in enumerate(self.shares) if share * self.size > 1e-6]
        weights = [float(self.shares[place]) for place in some]
        drawn = mixed([repeat(place).__iter__ for place in some], weights, "all_exhausted")
        return np.fromiter(islice(drawn, self.size), dtype=np.int64, count=self.size)

    def _walked(self, number: int, pool: np.ndarray, begin: int, count: int) -> np.ndarray:
        """Return the rows of a domain from the `begin`-th on: pass after pass, each in an order of its own."""
        first, last = begin // len(pool), (begin + max(count, 1) - 1) // len(pool)
        passes = [pool[permutation(len(pool), self.seed, number, one)] for one in range(first, last + 1)]
        return np.concatenate(passes)[begin - first * len(pool) :][:count]

    def begin(self, gaps: Float[np.ndarray, "domains"]) -> None:
        """Take the shares that the first epoch is drawn with."""
        self.shares = next_shares(self.shares, gaps, self.smoothing)

    def advance(self, gaps: Float[np.ndarray, "domains"]) -> None:
        """End the present epoch and take the shares that the next one is drawn with."""
        self.taken = self.counts(self.every)
        self.shares = next_shares(self.shares, gaps, self.smoothing)
        self.passed += 1

    def counts(self, steps: int) -> Int[np.ndarray, "domains"]:
        """Return how many samples of each domain were trained on, `steps` after the present epoch began."""
        return self.taken + np.bincount(self.plan()[: steps * self.per_step], minlength=len(self.pools))

    def state_dict(self) -> dict[str, Tensor]:
        state = {"domains": np.array(list(self.pools)), "shares": self.shares, "taken": self.taken}
        state |= {"passed": np.array(self.passed)} | ({} if self.teacher is None else {"teacher": self.teacher})
        return {name: torch.from_numpy(np.array(value)) for name, value in state.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from a checkpoint. Raises ValueError where it is of other domains."""
        if state["domains"].tolist() != list(self.pools):
            raise ValueError("sampler: the checkpoint is of other domains than the data's")
        self.shares, self.taken, self.teacher = (state[name].numpy() for name in ("shares", "taken", "teacher"))
        self.passed = int(state["passed"])


def gaps_of(student: Float[np.ndarray, "domains"], teacher: Float[np.ndarray, "domains"]) -> np.ndarray:
    """Return PPL_student / PPL_teacher of each domain, from nats a token. Raises ValueError for what is no number."""
    if not (np.isfinite(student).all() and np.isfinite(teacher).all()):
        raise ValueError(f"sampler: nats a token by domain are {student} of the student, {teacher} of the teacher")
    return np.exp(np.minimum(student - teacher, FARTHEST))


def next_shares(
    shares: Float[np.ndarray, "domains"], gaps: Float[np.ndarray, "domains"], smoothing: float
) -> Float[np.ndarray, "domains"]:
    """Return (1 - s) psi / sum psi + s / N, psi = shares * exp(gaps - max gap) (arXiv 2407.16154, factor smoothing)."""
    psi = shares * np.exp(gaps - gaps.max())
    return (1 - smoothing) * psi / psi.sum() + smoothing / len(shares)
