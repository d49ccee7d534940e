"""The row part in Triton: the formulas of `formulas.py` in two or three passes over a chunk's logits.

1. `logsumexp_kernel`: the log-sum-exp of every distribution that the formulas need, online.
2. `terms_kernel`: per row, a value and one more sum for every formula; the gradient where it needs no sum over the
   row (then this is the last pass).
3. `terms_kernel` again, for gradients that need the sums.

What the slices of a row found is merged by a few small torch operations on `[rows, slices]`, by the same ones that
merge the slices of several devices. A gradient overwrites the logits it comes from, or goes to a buffer of the matrix
products' dtype.
"""

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kdlm_kernels.adaptive import head_share
from kdlm_kernels.distribution import blocks, softmax
from kdlm_kernels.formulas import Plan
from kdlm_kernels.merging import Merge
from kdlm_kernels.terms import Formula, Kind
from kdlm_kernels.triton_kernels import LERP, MEAN, SHARED, STUDENT, TEACHER, logsumexp_kernel, terms_kernel

BLOCK, WARPS = 2048, 8
PROGRAMS = 1024
"""Fewest programs that fill a GPU: with fewer rows than these, rows are cut into slices."""


class _Layout(NamedTuple):
    """Which log-sum-exps a plan needs, and where each formula finds its own.

    Attributes:
        sources, owners: of the distributions of the first call, then, from `first` on, of the second (power means).
        of_student, of_teacher, of_third: per formula, the column or -1.
    """

    sources: tuple[int, ...]
    owners: tuple[int, ...]
    first: int
    of_student: tuple[int, ...]
    of_teacher: tuple[int, ...]
    of_third: tuple[int, ...]


_LERPED = (Kind.TAID, Kind.GEOMETRIC)
_WITHOUT_STUDENT = (Kind.GEOMETRIC, Kind.TEACHER_CROSS_ENTROPY)
_WITHOUT_TEACHER = (Kind.TAID, Kind.CROSS_ENTROPY, Kind.ENTROPY)
_LOCAL = (Kind.FORWARD, Kind.TAID, Kind.GEOMETRIC, Kind.CROSS_ENTROPY)
"""Formulas whose gradient needs no sum over the row."""


@functools.lru_cache
def _layout(formulas: tuple[Formula, ...], whole: bool) -> _Layout:
    columns: dict[tuple, int] = {}
    owners: list[int] = []

    def column(owner: int, source: int, *key: float) -> int:
        if (source, *key) not in columns:
            columns[source, *key] = len(owners)
            owners.append(owner)
        return columns[source, *key]

    student, teacher, third = [], [], []
    for number, formula in enumerate(formulas):
        own = STUDENT.value if whole or formula.whole_vocabulary else SHARED.value
        kind, cooled = formula.kind, formula.temperature
        student.append(-1 if kind in _WITHOUT_STUDENT else column(number, own, cooled))
        teacher.append(-1 if kind in _WITHOUT_TEACHER else column(number, TEACHER.value, cooled))
        third.append(column(number, LERP.value, number) if kind in _LERPED else -1)
    first = len(owners)
    for number, formula in enumerate(formulas):
        if formula.kind == Kind.POWER_MEAN:
            third[number] = column(number, MEAN.value, number)
    return _Layout(tuple(key[0] for key in columns), tuple(owners), first, tuple(student), tuple(teacher), tuple(third))


@functools.lru_cache
def _constants(plan: Plan, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return `numbers` but for the weights and TAID's t, which change from step to step."""
    table = [[f.scale / f.temperature, 1 / f.temperature, f.a, f.b] for f in plan.formulas]
    student, teacher = plan.student, plan.teacher
    table.append([student.scale, student.softcap or 1.0, teacher.scale, teacher.softcap or 1.0])
    return torch.tensor(table, dtype=dtype, device=device)


def _numbers(plan: Plan, given: Tensor) -> Tensor:
    numbers = _constants(plan, given.dtype, given.device).clone()
    numbers[:-1, 0] *= given[:, 0]
    for number, formula in enumerate(plan.formulas):
        if formula.kind == Kind.TAID:
            numbers[number, 2] = given[number, 1]
    return numbers


def rows(
    z: Tensor,
    y: Tensor | None,
    labels: Tensor | None,
    factors: Tensor | None,
    numbers: Tensor,
    grad: Tensor | None,
    plan: Plan,
    merge: Merge,
) -> tuple[Tensor, list[Tensor]]:
    """Do what `formulas.rows` does, in kernels; `grad` may be narrower than `z`."""
    call = _Call(z, y, _numbers(plan, numbers), plan, merge)
    lse = call.logsumexps()
    extra = torch.ones(len(z), len(plan.formulas), dtype=z.dtype, device=z.device)
    places = torch.full((len(z),), -1, device=z.device)
    if labels is not None:
        inside = (labels >= merge.offset) & (labels < merge.offset + z.shape[1])
        places = torch.where(inside, labels - merge.offset, -1).contiguous()
    for number, formula in enumerate(plan.formulas):
        if formula.kind == Kind.ADAPTIVE:
            extra[:, number] = call.head_share(formula)
        elif formula.kind == Kind.CROSS_ENTROPY:
            extra[:, number] = merge.sum((places >= 0).to(z.dtype))
    factors = torch.ones_like(extra[:, 0]) if factors is None else factors.contiguous()  # a sum's is expanded
    local = all(formula.kind in _LOCAL for formula in plan.formulas if formula.graded)
    sums = call.terms(places, factors, lse, extra, None, grad if local else None, with_sums=True)
    if grad is not None and not local:
        call.terms(places, factors, lse, extra, sums, grad, with_sums=False)
    return _results(z, y, labels, numbers, plan, merge, extra, sums)


def _results(z, y, labels, numbers, plan: Plan, merge: Merge, extra: Tensor, sums: Tensor):
    """Turn the sums `[rows, formulas, 2]` into the total and the values of the terms and measures."""
    values: list[Tensor] = []
    total = torch.zeros(len(z), dtype=z.dtype, device=z.device)
    for number, formula in enumerate(plan.formulas):
        value = sums[:, number, 0]
        if formula.kind == Kind.ADAPTIVE:
            share = extra[:, number]
            value = share * value + (1 - share) * sums[:, number, 1]
        elif formula.kind == Kind.TEACHER_CROSS_ENTROPY:
            known = merge.sum(((labels >= merge.offset) & (labels < merge.offset + plan.shared)).to(z.dtype))
            value = torch.where(known > 0, value, torch.inf)
        value = value * formula.scale
        values.append(value)
        if formula.graded:
            total = total + numbers[number, 0] * value
    return total, values


def _dense(x: Tensor) -> Tensor:
    """Return rows whose elements lie side by side, as the kernels read them."""
    return x if x.stride(1) == 1 else x.contiguous()


class _Call:
    """The launches of one chunk."""

    def __init__(self, z: Tensor, y: Tensor | None, numbers: Tensor, plan: Plan, merge: Merge):
        self.z, self.y = _dense(z), None if y is None else _dense(y)
        self.numbers, self.plan, self.merge = numbers, plan, merge
        rows, vocab = z.shape
        self.layout = _layout(plan.formulas, plan.whole)
        self.slices: int = max(1, min(triton.cdiv(PROGRAMS, max(1, rows)), triton.cdiv(vocab, 4 * BLOCK)))
        self.width = triton.cdiv(triton.cdiv(vocab, self.slices), BLOCK) * BLOCK
        self.shape: dict[str, Any] = {
            "Z_SOFTCAP": plan.student.softcap is not None,
            "Y_SOFTCAP": plan.teacher.softcap is not None,
            "DTYPE": tl.float64 if z.dtype == torch.float64 else tl.float32,
            "BLOCK": BLOCK,
            "num_warps": WARPS,
        }

    @property
    def grid(self) -> tuple[int, int]:
        return len(self.z), self.slices

    @property
    def theirs(self) -> tuple[Tensor, int]:
        """The teacher's products and their stride; without teacher, something that is never read."""
        y = self.z if self.y is None else self.y
        return y, y.stride(0)

    def logsumexps(self) -> Tensor:
        """Return `[rows, distributions, 2]`: log-sum-exps as the largest logit and what the others add to it."""
        first = self.layout.first
        known = self._logsumexps(slice(0, first), self.z)
        if first == len(self.layout.sources):
            return known
        return torch.cat([known, self._logsumexps(slice(first, None), known)], dim=1)

    def _logsumexps(self, which: slice, known: Tensor) -> Tensor:
        sources, owners = self.layout.sources[which], self.layout.owners[which]
        out = self.z.new_empty(*self.grid, len(sources), 2)
        y, y_stride = self.theirs
        constants: dict[str, Any] = {
            "SOURCES": sources,
            "OWNERS": owners,
            "OF_STUDENT": tuple(self.layout.of_student[owner] for owner in owners),
            "OF_TEACHER": tuple(self.layout.of_teacher[owner] for owner in owners),
            "FORMULAS": len(self.plan.formulas),
            "HAS_TEACHER": self.y is not None,
        }
        logsumexp_kernel[self.grid](
            self.z, y, out, known, self.numbers, self.z.stride(0), y_stride, known.stride(0),
            self.z.shape[1], self.plan.shared, self.width,
            **constants, **self.shape,
        )  # fmt: skip
        tops, totals = out.unbind(-1)
        top = self.merge.max(tops.amax(1))
        total = self.merge.sum((totals * (tops - top[:, None]).exp()).sum(1))
        return torch.stack([top, total.log()], -1)

    def terms(
        self,
        places: Tensor,
        factors: Tensor,
        lse: Tensor,
        extra: Tensor,
        sums: Tensor | None,
        grad: Tensor | None,
        *,
        with_sums: bool,
    ) -> Tensor:
        """Return the sums `[rows, formulas, 2]`; fill `grad` where it is given, which needs `sums` for some."""
        count = len(self.plan.formulas)
        out = self.z.new_empty(*self.grid, count, 2)
        y, y_stride = self.theirs
        into = self.z if grad is None else grad
        constants: dict[str, Any] = {
            "KINDS": tuple(int(formula.kind) for formula in self.plan.formulas),
            "GRADED": tuple(formula.graded for formula in self.plan.formulas),
            "OF_STUDENT": self.layout.of_student,
            "OF_TEACHER": self.layout.of_teacher,
            "OF_THIRD": self.layout.of_third,
            "WITH_SUMS": with_sums,
            "WITH_GRAD": grad is not None,
            "HAS_TEACHER": self.y is not None,
        }
        terms_kernel[self.grid](
            self.z, y, into, places, factors, lse, extra, extra if sums is None else sums, out, self.numbers,
            self.z.stride(0), y_stride, into.stride(0), lse.stride(0), self.z.shape[1], self.plan.shared, self.width,
            **constants, **self.shape,
        )  # fmt: skip
        return self.merge.sum(out[:, 0] if self.slices == 1 else out.sum(1))

    def head_share(self, formula: Formula) -> Tensor:
        """Return the adaptive weight of each row, in torch: it needs a threshold per row, found in several passes."""
        assert self.y is not None
        out, shared = self.z.new_empty(len(self.z)), self.plan.shared
        for block in blocks(len(self.z), self.merge.size(self.z.shape[1]), self.z.device):
            q, p = (
                softmax(shape(logits[block, :shared]) / formula.temperature, self.merge)
                for shape, logits in ((self.plan.student, self.z), (self.plan.teacher, self.y))
            )
            out[block] = head_share(p, q, formula.a, self.merge)[:, 0]
        return out


def normalise(z: Tensor, plan: Plan, merge: Merge, *, entropy: bool) -> tuple[Tensor, Tensor | None]:
    """Return the log-sum-exp `[rows, 1, 2]` of the plan's one distribution, the student's, and its entropy or None."""
    call = _Call(z, None, _numbers(plan, torch.zeros(1, 2, dtype=z.dtype, device=z.device)), plan, merge)
    lse = call.logsumexps()
    if not entropy:
        return lse, None
    ones = torch.ones(len(z), 1, dtype=z.dtype, device=z.device)
    places = torch.full((len(z),), -1, device=z.device)
    return lse, call.terms(places, ones[:, 0], lse, ones, None, None, with_sums=True)[:, 0, 0]


def write_scaled(z: Tensor, grad: Tensor, lse: Tensor, c: Tensor, plan: Plan, merge: Merge) -> None:
    """Write the gradient to `z` of a value whose derivative to the tempered logits is `c q`."""
    # Cross-entropy's gradient is `kept q` but for its label; here c is what is kept, and no row has a label.
    formula = plan.formulas[0]._replace(kind=Kind.CROSS_ENTROPY, graded=True)
    plan = plan._replace(formulas=(formula,))
    ones = torch.ones(1, 2, dtype=z.dtype, device=z.device)
    places = torch.full((len(z),), -1, device=z.device)
    call = _Call(z, None, _numbers(plan, ones), plan, merge)
    call.terms(places, torch.ones_like(c), lse, c[:, None].contiguous(), None, grad, with_sums=False)
