"""How figures of one slice of the vocabulary become those of all of it."""

from typing import Protocol

from torch import Tensor


class Merge(Protocol):
    """Turns figures of one slice of the vocabulary into those of all of it.

    `offset` is the first id of this slice, `size` the length of the longest, and `total` that of all of the student's
    (0) or the teacher's (1), where this one has `ids`; `hidden_gradient` sums a gradient to hidden states in place.
    """

    offset: int

    def sum(self, x: Tensor) -> Tensor: ...
    def max(self, x: Tensor) -> Tensor: ...
    def argmax(self, x: Tensor) -> Tensor: ...
    def size(self, ids: int) -> int: ...
    def total(self, which: int, ids: int) -> int: ...
    def hidden_gradient(self, gradient: Tensor) -> None: ...


class Here:
    """The vocabulary is whole: nothing to merge."""

    offset = 0

    def sum(self, x: Tensor) -> Tensor:
        return x

    def max(self, x: Tensor) -> Tensor:
        return x

    def argmax(self, x: Tensor) -> Tensor:
        return x.argmax(-1)

    def size(self, ids: int) -> int:
        return ids

    def total(self, which: int, ids: int) -> int:
        return ids

    def hidden_gradient(self, gradient: Tensor) -> None:
        pass
