"""The row part in torch: value and gradient of every formula, written out.

`p` is the teacher's distribution, `q` the student's, both at the formula's temperature; `d = log p - log q`. Each
formula returns its value and its gradient to `log q` taken through the softmax, `g = f - q sum(f)` where `f` is the
derivative to the logarithm of q. It runs on blocks of a few rows, whose temporaries are small and stay
in the processor's cache.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kdlm_kernels.adaptive import head_share
from kdlm_kernels.distribution import Distribution, softmax
from kdlm_kernels.heads import Shape
from kdlm_kernels.merging import Merge
from kdlm_kernels.terms import Formula, Kind

_RATIO = 80.0
"""`exp` of the log-ratio is finite up to here, beyond which q is nothing beside p."""
_LEAST = -1e30
"""In place of a log-ratio of -inf: its exponential is 0, and so is 0 times it."""


class Plan(NamedTuple):
    """What a call computes, whatever the numbers.

    Attributes:
        formulas, names: the terms, and the measures that are sums.
        comparisons: measures that compare arg-maxima.
        student, teacher: what the heads do after their products.
        shared: ids that both models score (on this slice); the student may score more.
        whole: whether the student scores no more than these, on any slice.
    """

    formulas: tuple[Formula, ...]
    names: tuple[str, ...]
    comparisons: tuple[str, ...]
    student: Shape
    teacher: Shape
    shared: int
    whole: bool = True


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
    """Return the weighted sum of the terms and every term of a block of rows; fill `grad`, which may be `z`.

    Args:
        z, y: the products of student and teacher, `[n, vocab]`.
        labels: the next token of each row (CROSS_ENTROPY, TEACHER_CROSS_ENTROPY).
        factors: upstream gradient of each row; None stands for 1.
        numbers: `[terms, 2]`: the weight of each, and TAID's t.
    """
    student = plan.student(z)
    teacher = None if y is None else plan.teacher(y)[:, : plan.shared]
    if teacher is not None:
        teacher = teacher.to(student.dtype)
    known: dict[tuple, Distribution] = {}

    def distribution(which: str, x: Tensor, temperature: float) -> Distribution:
        key = (which, temperature)
        if key not in known:
            known[key] = softmax(x if temperature == 1.0 else x / temperature, merge)
        return known[key]

    values: list[Tensor] = []
    total = torch.zeros(len(z), dtype=student.dtype, device=z.device)
    gradient: Tensor | None = None
    for number, formula in enumerate(plan.formulas):
        weight, t = numbers[number, 0], numbers[number, 1]
        own = student if formula.whole_vocabulary or plan.whole else student[:, : plan.shared]
        q = distribution("student" if own is student else "shared", own, formula.temperature)
        p = q
        if teacher is not None and not formula.whole_vocabulary:
            p = distribution("teacher", teacher, formula.temperature)
        mixed = p
        if formula.kind in (Kind.TAID, Kind.GEOMETRIC):
            assert teacher is not None
            x = _interpolated(formula, own, teacher, t)
            mixed = softmax(x if formula.temperature == 1.0 else x / formula.temperature, merge)
        value, g = _formula(formula, q, p, mixed, labels, merge, grad is not None and formula.graded)
        if formula.scale != 1.0:
            value = value * formula.scale
        values.append(value)
        if formula.graded:
            total = total + weight * value
        if g is None:
            continue
        g = g.mul_(weight * (formula.scale / formula.temperature))
        if gradient is None and own is student:
            gradient = g
        else:
            if gradient is None:
                gradient = torch.zeros_like(student)
            gradient[:, : g.shape[-1]] += g
    if grad is not None:
        _finish(grad, gradient, factors, student, plan.student)
    return total, values


def _finish(grad: Tensor, found: Tensor | None, factors: Tensor | None, logits: Tensor, shape: Shape) -> None:
    """Write the gradient to the product."""
    if found is None:
        grad.zero_()
        return
    shape.chain(found, logits)
    if factors is not None:
        found.mul_(factors[:, None])
    grad.copy_(found)


def _formula(
    formula: Formula,
    q: Distribution,
    p: Distribution,
    mixed: Distribution,
    labels: Tensor | None,
    merge: Merge,
    graded: bool,
) -> tuple[Tensor, Tensor | None]:
    """Return value `[n]` and gradient `[n, vocab]` (None where it is not wanted), a tensor of its own."""

    def sums(x: Tensor) -> Tensor:
        return merge.sum(x.sum(-1, keepdim=True))

    match formula.kind:
        case Kind.FORWARD:
            value = sums(p.times(p.logs - q.logs))
            return value[:, 0], q.probs - p.probs if graded else None
        case Kind.TAID:
            value = sums(mixed.times(mixed.logs - q.logs))
            return value[:, 0], q.probs - mixed.probs if graded else None
        case Kind.GEOMETRIC:
            value = sums(p.times(p.logs - mixed.logs))
            return value[:, 0], (mixed.probs - p.probs).mul_(1 - formula.a) if graded else None
        case Kind.REVERSE:
            terms = q.times(q.logs - p.logs)
            value = sums(terms)
            return value[:, 0], terms.addcmul_(q.probs, value, value=-1) if graded else None
        case Kind.SKEW:
            d = _log_ratio(p, q).clamp_(max=_RATIO)
            mixture = d.exp().mul_(formula.a).add_(1 - formula.a)  # of the mixture to q
            value = sums(d.sub_(mixture.log()).mul_(p.probs))
            if not graded:
                return value[:, 0], None
            f = mixture.reciprocal_().mul_(p.probs).mul_(1 - formula.a)
            return value[:, 0], (q.probs * sums(f)).sub_(f)
        case Kind.SKEW_REVERSE:
            d = _log_ratio(p, q).clamp_(max=_RATIO)
            mixture = d.exp_().mul_(1 - formula.a).add_(formula.a)
            logs = mixture.log()
            value = -sums(logs * q.probs)
            if not graded:
                return value[:, 0], None
            f = mixture.reciprocal_().mul_(-formula.a).sub_(logs)
            return value[:, 0], f.sub_(sums(f * q.probs)).mul_(q.probs)
        case Kind.JSD:
            d = _log_ratio(p, q).clamp_(max=_RATIO)
            logs = d.exp().mul_(formula.a).add_(1 - formula.a).log_()
            of_student = -sums(logs * q.probs)
            of_teacher = sums(d.sub_(logs).mul_(p.probs))
            value = formula.a * of_teacher + (1 - formula.a) * of_student
            return value[:, 0], logs.add_(of_student).mul_(q.probs).mul_(formula.a - 1) if graded else None
        case Kind.TOTAL_VARIATION:
            d = p.probs - q.probs
            value = sums(d.abs()) / 2
            if not graded:
                return value[:, 0], None
            sign = d.sign_()
            return value[:, 0], sign.sub_(sums(sign * q.probs)).mul_(q.probs).mul_(-0.5)
        case Kind.ADAPTIVE:
            return _adaptive(formula, q, p, merge, sums, graded)
        case Kind.POWER_MEAN:
            return _power_mean(formula, q, p, merge, sums, graded)
        case Kind.CROSS_ENTROPY:
            here, place, log_q = _label(labels, q.logs, merge)
            value = -merge.sum(log_q)
            if not graded:
                return value[:, 0], None
            kept = merge.sum(here)
            return value[:, 0], (q.probs * kept).scatter_add_(-1, place, -here)
        case Kind.ENTROPY:
            return -sums(q.times(q.logs.clone()))[:, 0], None
        case Kind.TEACHER_CROSS_ENTROPY:
            here, _, log_p = _label(labels, p.logs, merge)
            value = -merge.sum(log_p)
            return torch.where(merge.sum(here) > 0, value, torch.inf)[:, 0], None
    raise AssertionError(formula.kind)


def _interpolated(formula: Formula, own: Tensor, teacher: Tensor, t: Tensor) -> Tensor:
    """Return the logits of TAID's target, or those of the geometric mean."""
    if formula.kind == Kind.GEOMETRIC:
        return torch.add(own * (1 - formula.a), teacher, alpha=formula.a)
    own, teacher = own.clamp(min=_LEAST), teacher.clamp(min=_LEAST)  # t may be 0, and 0 times -inf is no number
    return torch.lerp(own, teacher, t)


def _log_ratio(p: Distribution, q: Distribution) -> Tensor:
    """Return `log(p / q)`, where p is 0 a number whose exponential is 0, also where q is."""
    d = p.logs - q.logs
    return d if p.zeros is None else d.masked_fill_(p.zeros, _LEAST)


def _label(labels: Tensor | None, logs: Tensor, merge: Merge) -> tuple[Tensor, Tensor, Tensor]:
    """Return, as `[n, 1]`, whether each label is one of these ids (1 or 0), where, or 0, and its `logs`, or 0."""
    assert labels is not None
    place = labels[:, None] - merge.offset
    inside = (place >= 0) & (place < logs.shape[-1])
    place = place.masked_fill(~inside, 0)
    found = logs.gather(-1, place) if logs.shape[-1] else logs.new_zeros(len(logs), 1)
    return inside.to(logs.dtype), place, found.masked_fill(~inside, 0.0)


def _adaptive(formula: Formula, q: Distribution, p: Distribution, merge: Merge, sums, graded: bool):
    w = head_share(p, q, formula.a, merge)
    d = p.logs - q.logs
    terms = q.times(-d)
    forward, reverse = sums(p.times(d)), sums(terms)
    value = w * forward + (1 - w) * reverse
    if not graded:
        return value[:, 0], None
    # w (q - p) + (1 - w) q (-d - reverse)
    back = terms.mul_(1 - w).addcmul_(q.probs, w - (1 - w) * reverse)
    return value[:, 0], back.addcmul_(p.probs, w, value=-1)


def _power_mean(formula: Formula, q: Distribution, p: Distribution, merge: Merge, sums, graded: bool):
    share, e = formula.a, formula.b
    # log of (share p^e + (1 - share) q^e)^(1/e). Not as log q and something beside it: q may be 0 where p is not.
    theirs, ours = (p.logs * e).add_(math.log(share)), (q.logs * e).add_(math.log1p(-share))
    mean = softmax(torch.logaddexp(theirs, ours).div_(e), merge)
    value = sums(p.times(p.logs - mean.logs))
    if not graded:
        return value[:, 0], None
    odds = ours.sub_(theirs)  # of the student's part
    if p.zeros is not None:  # not where p underflows: normalised, the mean may be there
        odds.masked_fill_(p.logs == -torch.inf, -_LEAST)
    f = (mean.probs - p.probs).mul_(odds.sigmoid_())
    return value[:, 0], f.sub_(q.probs * sums(f))


def coefficients(weights: Sequence[float], shares: Sequence[float | Tensor], like: Tensor) -> Tensor:
    """Return `numbers` of `rows`, in the precision and on the device of `like`."""
    numbers = torch.tensor([[w, 0.0] for w in weights], dtype=like.dtype, device=like.device)
    for number, t in enumerate(shares):
        if isinstance(t, Tensor):
            numbers[number, 1].copy_(t, non_blocking=True)
        elif t:
            numbers[number, 1] = t
    return numbers
