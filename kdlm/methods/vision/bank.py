"""Bank: the embeddings that two networks gave the training rows when they last saw them."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

SIDES = ("student", "teacher")


class Bank:
    """One vector of length 1 for each training row and side, at random to begin with.

    What a step sees is noted, and taken up when the optimiser step is done: so the bank does not depend on how a
    batch is cut. It takes the mean of old and new, by `momentum`, at length 1 (CRD, arXiv 1910.10699).

    Args:
        rows: of the training data, whose `index` is the place.
        width: of the embeddings.
        momentum: weight of what the bank held.
        temperature: that of the scores, for `log_partition`.
        seed: of the first vectors, which are the same on every rank.
    """

    def __init__(self, rows: int, width: int, *, momentum: float, temperature: float, seed: int):
        generator = torch.Generator().manual_seed(seed)
        self.of = {side: normalize(torch.randn(rows, width, generator=generator), dim=-1) for side in SIDES}
        self.momentum = momentum
        self.noted: list[tuple[Tensor, dict[str, Tensor]]] = []
        first = {side: vectors[:1024] for side, vectors in self.of.items()}
        self.log_partition = (first["student"] @ first["teacher"].T / temperature).exp().mean().mul(rows).log()
        """log Z: the scores of random embeddings summed over the rows. The released code takes it from the first batch,
        whose embeddings meet a random bank; this is the expectation, and the order of the data does not change it."""

    def __len__(self) -> int:
        return len(self.of["student"])

    def at(self, side: str, places: Int[Tensor, "*rows"]) -> Float[Tensor, "*rows width"]:
        """Return the vectors of a side at these rows. Raises ValueError for a row that the bank has no place for."""
        if self.of[side].device != places.device:
            self.of = {name: vectors.to(places.device) for name, vectors in self.of.items()}
        if places.numel() and int(places.max()) >= len(self):
            raise ValueError(f"method.memory: row {int(places.max())} of the data has no place among {len(self)}")
        return self.of[side][places]

    def note(self, index: Int[Tensor, "rows"], **seen: Float[Tensor, "rows width"]) -> None:
        """Remember embeddings of a step, by side, until it is done."""
        self.noted.append((index, {side: vectors.detach() for side, vectors in seen.items()}))

    def take_up(self) -> None:
        """Move the vectors of the rows that the step saw."""
        for index, seen in self.noted:
            for side, vectors in seen.items():
                moved = self.momentum * self.at(side, index) + (1 - self.momentum) * vectors.to(self.of[side])
                self.of[side][index] = normalize(moved, dim=-1)
        self.noted.clear()

    def state_dict(self) -> dict[str, Tensor]:
        """Return the vectors and log Z."""
        return {**self.of, "log_partition": self.log_partition}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take back what `state_dict` gave."""
        self.of, self.log_partition = {side: state[side] for side in SIDES}, state["log_partition"]
