"""The row part in Triton: the formulas of `formulas.py` in two or three passes over a chunk's logits.

1. `_logsumexp_kernel`: the log-sum-exp of every distribution that the formulas need, online.
2. `_terms_kernel`: per row, a value and one more sum for every formula; the gradient where it needs no sum over the
   row (then this is the last pass).
3. `_terms_kernel` again, for gradients that need the sums.

Each kernel has one program per row and slice of the vocabulary. What the slices of a row found is merged by a few
small torch operations on `[rows, slices]`, by the same ones that merge the slices of several devices. Within a
program lanes keep accumulators of their own, so nothing crosses lanes before the end. A gradient overwrites the
logits it comes from, or goes to a buffer of the matrix products' dtype.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kdlm_kernels.formulas import Merge, Plan, blocks, head_share, softmax
from kdlm_kernels.terms import Formula, Kind

FORWARD = tl.constexpr(int(Kind.FORWARD))
REVERSE = tl.constexpr(int(Kind.REVERSE))
SKEW = tl.constexpr(int(Kind.SKEW))
SKEW_REVERSE = tl.constexpr(int(Kind.SKEW_REVERSE))
JSD = tl.constexpr(int(Kind.JSD))
TOTAL_VARIATION = tl.constexpr(int(Kind.TOTAL_VARIATION))
ADAPTIVE = tl.constexpr(int(Kind.ADAPTIVE))
POWER_MEAN = tl.constexpr(int(Kind.POWER_MEAN))
GEOMETRIC = tl.constexpr(int(Kind.GEOMETRIC))
TAID = tl.constexpr(int(Kind.TAID))
CROSS_ENTROPY = tl.constexpr(int(Kind.CROSS_ENTROPY))
ENTROPY = tl.constexpr(int(Kind.ENTROPY))
TEACHER_CROSS_ENTROPY = tl.constexpr(int(Kind.TEACHER_CROSS_ENTROPY))

# Distributions whose log-sum-exp is wanted.
STUDENT = tl.constexpr(0)  # over all of the student's ids
SHARED = tl.constexpr(1)  # over those that the teacher has too
TEACHER = tl.constexpr(2)
LERP = tl.constexpr(3)  # of the logits, by t or by the teacher's share
MEAN = tl.constexpr(4)  # the power mean of teacher and student

# Columns of `numbers`, one row per formula.
WEIGHT = tl.constexpr(0)  # weight * scale / temperature: factor of the gradient
COOLING = tl.constexpr(1)  # 1 / temperature
SHARE = tl.constexpr(2)
EXPONENT = tl.constexpr(3)
COLUMNS = tl.constexpr(4)
# One more row: the scale and the softcap of the student, and of the teacher. A float argument would be fp32.

BLOCK, WARPS = 2048, 8
PROGRAMS = 1024
"""Fewest programs that fill a GPU: with fewer rows than these, rows are cut into slices."""

LEAST = tl.constexpr(-1.0e30)
RATIO = tl.constexpr(80.0)


@triton.jit
def _load(pointer, places, mask, shape_pointer, SOFTCAP: tl.constexpr, DTYPE: tl.constexpr):
    """Logits of a block: the product, times the scale, through the softcap."""
    x = tl.load(pointer + places, mask=mask, other=0.0).to(DTYPE) * tl.load(shape_pointer)
    if SOFTCAP:
        cap = tl.load(shape_pointer + 1)
        x = cap * (1 - 2 / (tl.exp(2 * x / cap) + 1))
    return x


@triton.jit
def _log_mean(lp, lq, share, exponent):
    """`log (share p^e + (1 - share) q^e)^(1/e)`, and the student's part of that sum."""
    x = (lp - lq) * exponent + tl.log(share / (1 - share))
    small = tl.exp(-tl.abs(x))
    softplus = tl.maximum(x, 0.0) + tl.log(1 + small)
    part = tl.where(x > 0, small, 1.0) / (1 + small)
    return lq + (softplus + tl.log(1 - share)) / exponent, part


@triton.jit
def _logsumexp_kernel(
    z_pointer,  # [rows, *] student's products
    y_pointer,  # [rows, *] teacher's
    out_pointer,  # [rows, slices, distributions]
    known_pointer,  # [rows, known]: log-sum-exps from an earlier call, for MEAN
    numbers_pointer,  # [formulas, COLUMNS]
    z_stride,
    y_stride,
    known_stride,
    vocab,
    shared,
    width,  # ids per slice, a multiple of BLOCK
    SOURCES: tl.constexpr,  # per distribution: STUDENT ... MEAN
    OWNERS: tl.constexpr,  # the formula whose numbers it uses
    OF_STUDENT: tl.constexpr,  # MEAN: columns in `known`
    OF_TEACHER: tl.constexpr,
    FORMULAS: tl.constexpr,  # how many
    Z_SOFTCAP: tl.constexpr,
    Y_SOFTCAP: tl.constexpr,
    HAS_TEACHER: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    z_pointer += row * z_stride
    y_pointer += row * y_stride
    shape_pointer = numbers_pointer + FORMULAS * COLUMNS
    accumulators = ()
    for _ in tl.static_range(len(SOURCES)):
        accumulators = accumulators + (tl.full([BLOCK], LEAST, DTYPE), tl.zeros([BLOCK], DTYPE))
    for start in range(part * width, min((part + 1) * width, vocab), BLOCK):
        places = start + tl.arange(0, BLOCK)
        inside, common = places < vocab, places < shared
        s = _load(z_pointer, places, inside, shape_pointer, Z_SOFTCAP, DTYPE)
        t = s
        if HAS_TEACHER:
            t = _load(y_pointer, places, common, shape_pointer + 2, Y_SOFTCAP, DTYPE)
        updated = ()
        for i in tl.static_range(len(SOURCES)):
            numbers = numbers_pointer + OWNERS[i] * COLUMNS
            cooling = tl.load(numbers + COOLING)
            mask = common
            if SOURCES[i] == STUDENT:
                x, mask = s * cooling, inside
            elif SOURCES[i] == SHARED:
                x = s * cooling
            elif SOURCES[i] == TEACHER:
                x = t * cooling
            elif SOURCES[i] == LERP:
                x = (s + tl.load(numbers + SHARE) * (t - s)) * cooling
            else:
                known = known_pointer + row * known_stride
                lq = s * cooling - tl.load(known + OF_STUDENT[i])
                lp = t * cooling - tl.load(known + OF_TEACHER[i])
                x, _part = _log_mean(lp, lq, tl.load(numbers + SHARE), tl.load(numbers + EXPONENT))
            # One exponential per logit: it scales down either the new one or what was summed before.
            top, total = accumulators[2 * i], accumulators[2 * i + 1]
            beyond = tl.where(mask, x - top, float("-inf"))
            small = tl.exp(-tl.abs(beyond))
            total = tl.where(beyond > 0, total * small + 1, total + small)
            updated = updated + (tl.where(beyond > 0, x, top), total)
        accumulators = updated
    out_pointer += (row * tl.num_programs(1) + part) * len(SOURCES)
    for i in tl.static_range(len(SOURCES)):
        top, total = accumulators[2 * i], accumulators[2 * i + 1]
        most = tl.max(top, 0)
        tl.store(out_pointer + i, most + tl.log(tl.sum(total * tl.exp(top - most), 0)))


@triton.jit
def _sums(KIND: tl.constexpr, lq, lp, lr, share, exponent, chosen):
    """What a formula sums over the vocabulary: its value, and what its gradient needs of the row."""
    if KIND == FORWARD:
        value = tl.exp(lp) * (lp - lq)
        other = value
    elif KIND == TAID:
        value = tl.exp(lr) * (lr - lq)
        other = value
    elif KIND == GEOMETRIC:
        value = tl.exp(lp) * (lp - lr)
        other = value
    elif KIND == REVERSE:
        value = tl.exp(lq) * (lq - lp)
        other = value
    elif KIND == SKEW:
        d = tl.minimum(lp - lq, RATIO)
        mixture = share * tl.exp(d) + (1 - share)
        p = tl.exp(lp)
        value = p * (d - tl.log(mixture))
        other = p * (1 - share) / mixture
    elif KIND == SKEW_REVERSE:
        mixture = (1 - share) * tl.exp(tl.minimum(lp - lq, RATIO)) + share
        q, logs = tl.exp(lq), tl.log(mixture)
        value = -q * logs
        other = -q * (logs + share / mixture)
    elif KIND == JSD:
        d = tl.minimum(lp - lq, RATIO)
        logs = tl.log(share * tl.exp(d) + (1 - share))
        other = -tl.exp(lq) * logs
        value = share * tl.exp(lp) * (d - logs) + (1 - share) * other
    elif KIND == TOTAL_VARIATION:
        p, q = tl.exp(lp), tl.exp(lq)
        value = 0.5 * tl.abs(p - q)
        other = tl.where(p > q, q, tl.where(p < q, -q, 0.0))
    elif KIND == ADAPTIVE:
        p, q = tl.exp(lp), tl.exp(lq)
        value = p * (lp - lq)
        other = q * (lq - lp)
    elif KIND == POWER_MEAN:
        logs, part = _log_mean(lp, lq, share, exponent)
        p = tl.exp(lp)
        value = p * (lp - logs + lr)
        other = (tl.exp(logs - lr) - p) * part
    elif KIND == CROSS_ENTROPY:
        value = tl.where(chosen, -lq, 0.0)
        other = value
    elif KIND == TEACHER_CROSS_ENTROPY:
        value = tl.where(chosen, -lp, 0.0)
        other = value
    else:
        value = -tl.exp(lq) * lq
        other = value
    return value, other


@triton.jit
def _gradient(KIND: tl.constexpr, lq, lp, lr, share, exponent, value, other, extra, chosen):
    """The derivative to the student's tempered logits; `value`, `other` and `extra` are the row's."""
    if KIND == FORWARD:
        g = tl.exp(lq) - tl.exp(lp)
    elif KIND == TAID:
        g = tl.exp(lq) - tl.exp(lr)
    elif KIND == GEOMETRIC:
        g = (1 - share) * (tl.exp(lr) - tl.exp(lp))
    elif KIND == REVERSE:
        g = tl.exp(lq) * (lq - lp - value)
    elif KIND == SKEW:
        mixture = share * tl.exp(tl.minimum(lp - lq, RATIO)) + (1 - share)
        g = tl.exp(lq) * other - tl.exp(lp) * (1 - share) / mixture
    elif KIND == SKEW_REVERSE:
        mixture = (1 - share) * tl.exp(tl.minimum(lp - lq, RATIO)) + share
        g = -tl.exp(lq) * (tl.log(mixture) + share / mixture + other)
    elif KIND == JSD:
        logs = tl.log(share * tl.exp(tl.minimum(lp - lq, RATIO)) + (1 - share))
        g = (share - 1) * tl.exp(lq) * (logs + other)
    elif KIND == TOTAL_VARIATION:
        p, q = tl.exp(lp), tl.exp(lq)
        g = -0.5 * q * (tl.where(p > q, 1.0, tl.where(p < q, -1.0, 0.0)) - other)
    elif KIND == ADAPTIVE:
        p, q = tl.exp(lp), tl.exp(lq)
        g = extra * (q - p) + (1 - extra) * q * (lq - lp - other)
    elif KIND == POWER_MEAN:
        logs, part = _log_mean(lp, lq, share, exponent)
        g = (tl.exp(logs - lr) - tl.exp(lp)) * part - tl.exp(lq) * other
    else:
        g = extra * tl.exp(lq) - tl.where(chosen, 1.0, 0.0)
    return g


@triton.jit
def _terms_kernel(
    z_pointer,  # [rows, *] student's products
    y_pointer,  # [rows, *] teacher's
    grad_pointer,  # [rows, *] may be z
    label_pointer,  # [rows], -1 where there is none
    factor_pointer,  # [rows]
    lse_pointer,  # [rows, distributions]
    extra_pointer,  # [rows, formulas]: the adaptive weight, or whether the row has a label
    total_pointer,  # [rows, formulas, 2]: sums of an earlier call
    out_pointer,  # [rows, slices, formulas, 2]
    numbers_pointer,  # [formulas, COLUMNS]
    z_stride,
    y_stride,
    grad_stride,
    lse_stride,
    vocab,
    shared,
    width,
    KINDS: tl.constexpr,  # per formula
    GRADED: tl.constexpr,
    OF_STUDENT: tl.constexpr,  # columns of its log-sum-exps in `lse`
    OF_TEACHER: tl.constexpr,
    OF_THIRD: tl.constexpr,
    WITH_SUMS: tl.constexpr,
    WITH_GRAD: tl.constexpr,
    Z_SOFTCAP: tl.constexpr,
    Y_SOFTCAP: tl.constexpr,
    HAS_TEACHER: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    z_pointer += row * z_stride
    y_pointer += row * y_stride
    grad_pointer += row * grad_stride
    lse_pointer += row * lse_stride
    extra_pointer += row * len(KINDS)
    total_pointer += row * len(KINDS) * 2
    shape_pointer = numbers_pointer + len(KINDS) * COLUMNS
    label = tl.load(label_pointer + row)
    factor = tl.load(factor_pointer + row)
    sums = ()
    if WITH_SUMS:
        for _ in tl.static_range(2 * len(KINDS)):
            sums = sums + (tl.zeros([BLOCK], DTYPE),)
    for start in range(part * width, min((part + 1) * width, vocab), BLOCK):
        places = start + tl.arange(0, BLOCK)
        inside, common, chosen = places < vocab, places < shared, places == label
        s = _load(z_pointer, places, inside, shape_pointer, Z_SOFTCAP, DTYPE)
        t = s
        if HAS_TEACHER:
            t = _load(y_pointer, places, common, shape_pointer + 2, Y_SOFTCAP, DTYPE)
        grad = tl.zeros([BLOCK], DTYPE)
        updated = ()
        for i in tl.static_range(len(KINDS)):
            numbers = numbers_pointer + i * COLUMNS
            cooling, share = tl.load(numbers + COOLING), tl.load(numbers + SHARE)
            exponent = tl.load(numbers + EXPONENT)
            lq, lp, lr = s, s, s
            if OF_STUDENT[i] >= 0:
                lq = s * cooling - tl.load(lse_pointer + OF_STUDENT[i])
            if OF_TEACHER[i] >= 0:
                lp = t * cooling - tl.load(lse_pointer + OF_TEACHER[i])
            if OF_THIRD[i] >= 0:
                third = tl.load(lse_pointer + OF_THIRD[i])
                if KINDS[i] == POWER_MEAN:
                    lr = tl.zeros([BLOCK], DTYPE) + third
                else:
                    lr = (s + share * (t - s)) * cooling - third
            mask = common
            if KINDS[i] == CROSS_ENTROPY or KINDS[i] == ENTROPY:
                mask = inside
            if WITH_SUMS:
                value, other = _sums(KINDS[i], lq, lp, lr, share, exponent, chosen)
                updated = updated + (
                    sums[2 * i] + tl.where(mask, value, 0.0),
                    sums[2 * i + 1] + tl.where(mask, other, 0.0),
                )
            if WITH_GRAD and GRADED[i]:
                total = tl.load(total_pointer + 2 * i)
                other_total = tl.load(total_pointer + 2 * i + 1)
                extra = tl.load(extra_pointer + i)
                g = _gradient(KINDS[i], lq, lp, lr, share, exponent, total, other_total, extra, chosen)
                grad += tl.where(mask, g * tl.load(numbers + WEIGHT), 0.0)
        sums = updated
        if WITH_GRAD:
            grad *= factor * tl.load(shape_pointer)
            if Z_SOFTCAP:
                capped = s / tl.load(shape_pointer + 1)
                grad *= 1 - capped * capped
            tl.store(grad_pointer + places, grad, mask=inside)
    if WITH_SUMS:
        out_pointer += (row * tl.num_programs(1) + part) * len(KINDS) * 2
        for i in tl.static_range(2 * len(KINDS)):
            tl.store(out_pointer + i, tl.sum(sums[i], 0))


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
        places = torch.where(inside, labels - merge.offset, -1)
    for number, formula in enumerate(plan.formulas):
        if formula.kind == Kind.ADAPTIVE:
            extra[:, number] = call.head_share(formula)
        elif formula.kind == Kind.CROSS_ENTROPY:
            extra[:, number] = merge.sum((places >= 0).to(z.dtype))
    factors = torch.ones_like(extra[:, 0]) if factors is None else factors
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
            value = torch.lerp(sums[:, number, 1], value, extra[:, number])
        elif formula.kind == Kind.TEACHER_CROSS_ENTROPY:
            known = merge.sum(((labels >= merge.offset) & (labels < merge.offset + plan.shared)).to(z.dtype))
            value = torch.where(known > 0, value, torch.inf)
        value = value * formula.scale
        values.append(value)
        if formula.graded:
            total = total + numbers[number, 0] * value
    return total, values


class _Call:
    """The launches of one chunk."""

    def __init__(self, z: Tensor, y: Tensor | None, numbers: Tensor, plan: Plan, merge: Merge):
        self.z, self.y, self.numbers, self.plan, self.merge = z, y, numbers, plan, merge
        rows, vocab = z.shape
        self.layout = _layout(plan.formulas, plan.shared == vocab)
        self.slices = max(1, min(triton.cdiv(PROGRAMS, max(1, rows)), triton.cdiv(vocab, 4 * BLOCK)))
        self.width = triton.cdiv(triton.cdiv(vocab, self.slices), BLOCK) * BLOCK
        self.shape = {
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
        """Return `[rows, distributions]`."""
        first = self.layout.first
        known = self._logsumexps(slice(0, first), self.z)
        if first == len(self.layout.sources):
            return known
        return torch.cat([known, self._logsumexps(slice(first, None), known)], dim=1)

    def _logsumexps(self, which: slice, known: Tensor) -> Tensor:
        sources, owners = self.layout.sources[which], self.layout.owners[which]
        out = self.z.new_empty(*self.grid, len(sources))
        y, y_stride = self.theirs
        _logsumexp_kernel[self.grid](
            self.z, y, out, known, self.numbers, self.z.stride(0), y_stride, known.stride(0),
            self.z.shape[1], self.plan.shared, self.width,
            SOURCES=sources, OWNERS=owners,
            OF_STUDENT=tuple(self.layout.of_student[owner] for owner in owners),
            OF_TEACHER=tuple(self.layout.of_teacher[owner] for owner in owners),
            FORMULAS=len(self.plan.formulas), HAS_TEACHER=self.y is not None, **self.shape,
        )  # fmt: skip
        return self.merge.logsumexp(out[:, 0] if self.slices == 1 else out.logsumexp(1))

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
        _terms_kernel[self.grid](
            self.z, y, into, places, factors, lse, extra, extra if sums is None else sums, out, self.numbers,
            self.z.stride(0), y_stride, into.stride(0), lse.stride(0), self.z.shape[1], self.plan.shared, self.width,
            KINDS=tuple(int(formula.kind) for formula in self.plan.formulas),
            GRADED=tuple(formula.graded for formula in self.plan.formulas),
            OF_STUDENT=self.layout.of_student, OF_TEACHER=self.layout.of_teacher, OF_THIRD=self.layout.of_third,
            WITH_SUMS=with_sums, WITH_GRAD=grad is not None, HAS_TEACHER=self.y is not None, **self.shape,
        )  # fmt: skip
        return self.merge.sum(out[:, 0] if self.slices == 1 else out.sum(1))

    def head_share(self, formula: Formula) -> Tensor:
        """Return the adaptive weight of each row, in torch: it needs a threshold per row, found in several passes."""
        out, shared = self.z.new_empty(len(self.z)), self.plan.shared
        for block in blocks(len(self.z), self.merge.size(self.z.shape[1]), self.z.device):
            q, p = (
                softmax(shape(logits[block, :shared]) / formula.temperature, self.merge)
                for shape, logits in ((self.plan.student, self.z), (self.plan.teacher, self.y))
            )
            out[block] = head_share(p, q, formula.a, self.merge)[:, 0]
        return out


def normalise(z: Tensor, plan: Plan, merge: Merge, *, entropy: bool) -> tuple[Tensor, Tensor | None]:
    """Return the log-sum-exp `[rows, 1]` of the plan's one distribution of the student, and its entropy if wanted."""
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
