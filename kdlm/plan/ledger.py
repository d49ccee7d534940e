"""Ledger: the bytes that tensors hold while code runs on fake tensors, by part of a run, and the work it does.

A fake tensor has a shape, a type and an autograd graph, and no numbers: the real
model, method, losses and optimiser run on them in the memory of none. The ledger sees every operation, counts the
storages that are alive, each under the part that was named when it was made, and keeps what was held at the peak.
"""

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten
UNSEEN = frozenset({torch.ops.prim.device.default})
"""What reads no numbers and makes none; half of all that is dispatched."""


SHARED = ("weights", "gradients", "optimiser", "copies", "teacher weights")
"""Parts of which each of several ranks may hold its share alone."""


@dataclass
class Work:
    """What a phase does: floating point operations of products, bytes read and written, operations started."""

    flops: float = 0.0
    bytes: float = 0.0
    calls: int = 0


@dataclass
class Phase:
    """One phase of a step.

    Attributes:
        peak: the most bytes held at once.
        parts: by part, at that moment.
        moments: bytes by part when the most was held with so many of each part that ranks may share out, the key: where
            the peak is if a rank holds less of these.
    """

    peak: int = 0
    parts: Counter[str] = field(default_factory=Counter)
    work: Work = field(default_factory=Work)
    moments: dict[tuple[int, ...], Counter[str]] = field(default_factory=dict)

    def remember(self, held: Counter[str]) -> None:
        """Keep what is held if it is the most with so many of the parts that ranks share out."""
        key = tuple([held[part] for part in SHARED])
        if key not in self.moments or sum(held.values()) > sum(self.moments[key].values()):
            self.moments[key] = held.copy()


class Fakes(FakeTensorMode):
    """The mode in which tensors have no numbers."""

    def __init__(self) -> None:
        super().__init__()
        # It would remember which fake tensor is whose, and `Module.to` refuses to replace what is remembered.
        self.fake_tensor_converter.set_tensor_memo = lambda real, fake: None

    def __deepcopy__(self, memo: dict[int, Any]) -> "Fakes":
        return self  # a copied network's tensors are of the same mode


class Ledger(TorchDispatchMode):
    """Counts inside `with Fakes(), Ledger() as ledger:`.

    What depends on numbers is answered as a plan wants it: all elements are other than zero and no two are equal, a
    number that is read is 1, and a condition is `holds`. A mask picks no elements out: kept rows are taken by index,
    and masks look for what is wrong.

    Attributes:
        holds: what a condition on numbers is taken for.
        fused: whether what is made under the part `loss` and freed again is left out, as in one kernel it never is.
        part: under which the storages that are made now are counted.
        held: bytes alive now, by part.
        phases: by name, as they came.
    """

    def __init__(self) -> None:
        super().__init__()
        self.part, self.holds, self.fused = "weights", True, False
        self.held: Counter[str] = Counter()
        self.phases: dict[str, Phase] = {}
        self._phase = Phase()
        self._total = 0
        self._grown = False
        self._storages: dict[int, tuple[Any, int, str]] = {}

    @contextmanager
    def phase(self, name: str, part: str) -> Iterator[None]:
        """Count what is done under a phase, and what is made under a part; then go back to those before."""
        before = self._phase, self.part
        self._remember()
        self._phase, self.part = self.phases.setdefault(name, Phase()), part
        self._look()
        try:
            yield
        finally:
            self._remember()
            self._phase, self.part = before

    @contextmanager
    def making(self, part: str) -> Iterator[None]:
        """Count what is made under a part."""
        before, self.part = self.part, part
        try:
            yield
        finally:
            self.part = before

    def add(self, size: int, part: str) -> None:
        """Count a peak of this phase in which a part holds so many bytes more than what is alive."""
        if not size:
            return
        held = self.held + Counter({part: size})
        self._phase.remember(held)
        if self._total + size > self._phase.peak:
            self._phase.peak, self._phase.parts = self._total + size, held

    def move(self, tensor: Tensor, part: str) -> None:
        """Count a tensor's storage under another part from now on."""
        key = tensor.untyped_storage()._cdata
        if key in self._storages:
            reference, size, old = self._storages[key]
            self.held[old] -= size
            self.held[part] += size
            self._storages[key] = reference, size, part

    def set_aside(self, tensor: Tensor) -> None:
        """Count a tensor's storage no more: it is in other memory, until `bring`."""
        self._resize(tensor, 0)

    def bring(self, tensor: Tensor) -> None:
        """Count again what was set aside."""
        self._resize(tensor, tensor.untyped_storage().nbytes())
        self._look()

    def _resize(self, tensor: Tensor, size: int) -> None:
        key = tensor.untyped_storage()._cdata
        reference, before, part = self._storages[key]
        if size < before:
            self._remember()
        self._storages[key] = reference, size, part
        self.held[part] += size - before
        self._total += size - before

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func in UNSEEN:
            return func(*args, **kwargs)
        if func is aten._local_scalar_dense.default:
            return self.holds if args[0].dtype == torch.bool else 1.0 if args[0].is_floating_point() else 1
        out = self._answered(func, args, kwargs)
        made = [leaf for leaf in tree_iter(out) if isinstance(leaf, Tensor)]
        part = "copies" if func is aten._to_copy.default and self._is_weight(args[0]) else self.part
        new = sum([self._track(tensor, part) for tensor in made])
        self._count(func, args, kwargs, out, new)
        return out

    def _answered(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Run an operation; where the shape of its result depends on numbers, the largest that it can be is taken."""
        if func is aten.nonzero.default:
            return args[0].new_empty((args[0].numel(), args[0].dim()), dtype=torch.int64)
        if func is aten.equal.default:
            return self.holds
        if func is aten._unique2.default:
            same = args[0].new_empty(args[0].numel(), dtype=torch.int64)
            return args[0].new_empty(args[0].numel()), same, same.clone()
        if func is aten.index.Tensor:
            args = args[0], [part for index in args[1] for part in _as_integers(index)]
        return func(*args, **kwargs)

    def _is_weight(self, tensor: Tensor) -> bool:
        """Whether mixed precision copies a weight of the student, for its forward and backward pass."""
        known = self._storages.get(tensor.untyped_storage()._cdata)
        return self.part == "activations" and known is not None and known[2] == "weights"

    def _track(self, tensor: Tensor, part: str) -> int:
        """Count a storage that is new; return its bytes."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._storages:
            return 0
        size = storage.nbytes()
        if self.fused and self.part == "loss":
            self._remember()  # before it, as it is left out
        self._storages[key] = weakref.ref(storage, lambda _: self._free(key)), size, part
        self.held[part] += size
        self._total += size
        self._look()
        return size

    def _free(self, key: int) -> None:
        self._remember()
        _, size, part = self._storages.pop(key)
        self.held[part] -= size
        self._total -= size

    def _look(self) -> None:
        if self.fused and self.part == "loss":
            return
        self._grown = True
        if self._total > self._phase.peak:
            self._phase.peak, self._phase.parts = self._total, self.held.copy()

    def _remember(self) -> None:
        """Keep what is held before it becomes less."""
        if self._grown:
            self._phase.remember(self.held)
            self._grown = False

    def _count(self, func: Any, args: tuple, kwargs: dict[str, Any], out: Any, new: int) -> None:
        """Add the work of an operation: views do none."""
        work, packet = self._phase.work, func._overloadpacket
        if packet in flop_registry:
            work.flops += flop_registry[packet](*args, **kwargs, out_val=out)
        elif packet in ATTENTION:
            work.flops += ATTENTION[packet](*args, **kwargs)
        elif (not new and not func._schema.is_mutable) or (self.fused and self.part == "loss"):
            return
        work.calls += 1
        read = sum(leaf.numel() * leaf.element_size() for leaf in tree_iter((args, kwargs)) if isinstance(leaf, Tensor))
        work.bytes += read + new


def _as_integers(index: Tensor | None) -> list[Tensor | None]:
    """Return an index as it is, or in place of a mask no element of any of its axes."""
    if index is None or index.dtype != torch.bool:
        return [index]
    return [index.new_empty(0, dtype=torch.int64) for _ in range(index.dim())]


def _attention(
    query: Tensor, key: Tensor, value: Tensor, dropout: float = 0.0, causal: bool = False, **_: Any
) -> float:
    """Return the FLOP of attention on a CPU, whose kernel torch's counter does not know; half where it is causal."""
    batch, heads, length, width = query.shape
    return 4 * batch * heads * length * key.shape[-2] * width * (0.5 if causal else 1.0)


def _attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, logs: Tensor, dropout: float, causal: bool,
    **_: Any,
) -> float:  # fmt: skip
    return 2.5 * _attention(query, key, value, dropout, causal)


ATTENTION = {
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
