"""The Triton kernels: the log-sum-exps of a row, and the sums and gradients of its formulas.

Each has one program per row and slice of the vocabulary. Lanes keep accumulators of their own, so nothing crosses
them before a program ends. `triton_rows` launches them.
"""

import triton
import triton.language as tl

from kdlm_kernels.terms import Kind

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
def _normalise(x, lse_pointer, COLUMN: tl.constexpr):
    """Subtract a log-sum-exp in its two parts, which keeps the digits that one sum of them would lose."""
    return x - tl.load(lse_pointer + 2 * COLUMN) - tl.load(lse_pointer + 2 * COLUMN + 1)


@triton.jit
def _times(p, x):
    """`p x`, and 0 where p is 0, whatever x is: `0 log 0 = 0`."""
    return tl.where(p == 0, 0.0, p * x)


@triton.jit
def _ratio(lp, lq):
    """`log(p / q)`, bounded from above; where p is 0 a number whose exponential is 0, also where q is."""
    return tl.minimum(tl.where(lp < LEAST, LEAST, lp - lq), RATIO)


@triton.jit
def _interpolate(s, t, share):
    """`(1 - share) s + share t`, in which a share of 0 leaves out an infinite logit."""
    return tl.where(share < 1, (1 - share) * s, 0.0) + tl.where(share > 0, share * t, 0.0)


@triton.jit
def _log_mean(lp, lq, share, exponent):
    """`log (share p^e + (1 - share) q^e)^(1/e)`, and the student's part of that sum."""
    theirs, ours = lp * exponent + tl.log(share), lq * exponent + tl.log(1 - share)
    x = tl.where(theirs == ours, 0.0, theirs - ours)  # both may be infinite
    small = tl.exp(-tl.abs(x))
    part = tl.where(x > 0, small, 1.0) / (1 + small)
    return (tl.maximum(theirs, ours) + tl.log(1 + small)) / exponent, part


@triton.jit
def logsumexp_kernel(
    z_pointer,  # [rows, *] student's products
    y_pointer,  # [rows, *] teacher's
    out_pointer,  # [rows, slices, distributions, 2]: the largest logit, and the sum of exp(logit - largest)
    known_pointer,  # [rows, known, 2]: log-sum-exps from an earlier call, for MEAN
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
                x = _interpolate(s, t, tl.load(numbers + SHARE)) * cooling
            else:
                known = known_pointer + row * known_stride
                lq = _normalise(s * cooling, known, OF_STUDENT[i])
                lp = _normalise(t * cooling, known, OF_TEACHER[i])
                x, _part = _log_mean(lp, lq, tl.load(numbers + SHARE), tl.load(numbers + EXPONENT))
            # One exponential per logit: it scales down either the new one or what was summed before.
            top, total = accumulators[2 * i], accumulators[2 * i + 1]
            beyond = tl.where(mask, x - top, float("-inf"))
            small = tl.exp(-tl.abs(beyond))
            total = tl.where(beyond > 0, total * small + 1, total + small)
            updated = updated + (tl.where(beyond > 0, x, top), total)
        accumulators = updated
    out_pointer += (row * tl.num_programs(1) + part) * len(SOURCES) * 2
    for i in tl.static_range(len(SOURCES)):
        top, total = accumulators[2 * i], accumulators[2 * i + 1]
        most = tl.max(top, 0)
        tl.store(out_pointer + 2 * i, most)
        tl.store(out_pointer + 2 * i + 1, tl.sum(total * tl.exp(top - most), 0))


@triton.jit
def _sums(KIND: tl.constexpr, lq, lp, lr, share, exponent, chosen):
    """What a formula sums over the vocabulary: its value, and what its gradient needs of the row."""
    if KIND == FORWARD:
        value = _times(tl.exp(lp), lp - lq)
        other = value
    elif KIND == TAID:
        value = _times(tl.exp(lr), lr - lq)
        other = value
    elif KIND == GEOMETRIC:
        value = _times(tl.exp(lp), lp - lr)
        other = value
    elif KIND == REVERSE:
        value = _times(tl.exp(lq), lq - lp)
        other = value
    elif KIND == SKEW:
        d = _ratio(lp, lq)
        mixture = share * tl.exp(d) + (1 - share)
        p = tl.exp(lp)
        value = p * (d - tl.log(mixture))
        other = p * (1 - share) / mixture
    elif KIND == SKEW_REVERSE:
        mixture = (1 - share) * tl.exp(_ratio(lp, lq)) + share
        q, logs = tl.exp(lq), tl.log(mixture)
        value = -q * logs
        other = -q * (logs + share / mixture)
    elif KIND == JSD:
        d = _ratio(lp, lq)
        logs = tl.log(share * tl.exp(d) + (1 - share))
        other = -tl.exp(lq) * logs
        value = share * tl.exp(lp) * (d - logs) + (1 - share) * other
    elif KIND == TOTAL_VARIATION:
        p, q = tl.exp(lp), tl.exp(lq)
        value = 0.5 * tl.abs(p - q)
        other = tl.where(p > q, q, tl.where(p < q, -q, 0.0))
    elif KIND == ADAPTIVE:
        p, q = tl.exp(lp), tl.exp(lq)
        value = _times(p, lp - lq)
        other = _times(q, lq - lp)
    elif KIND == POWER_MEAN:
        logs, part = _log_mean(lp, lq, share, exponent)
        p = tl.exp(lp)
        value = _times(p, lp - logs + lr)
        other = (tl.exp(logs - lr) - p) * part
    elif KIND == CROSS_ENTROPY:
        value = tl.where(chosen, -lq, 0.0)
        other = value
    elif KIND == TEACHER_CROSS_ENTROPY:
        value = tl.where(chosen, -lp, 0.0)
        other = value
    else:
        value = -_times(tl.exp(lq), lq)
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
        g = _times(tl.exp(lq), lq - lp - value)
    elif KIND == SKEW:
        mixture = share * tl.exp(_ratio(lp, lq)) + (1 - share)
        g = tl.exp(lq) * other - tl.exp(lp) * (1 - share) / mixture
    elif KIND == SKEW_REVERSE:
        mixture = (1 - share) * tl.exp(_ratio(lp, lq)) + share
        g = -tl.exp(lq) * (tl.log(mixture) + share / mixture + other)
    elif KIND == JSD:
        logs = tl.log(share * tl.exp(_ratio(lp, lq)) + (1 - share))
        g = (share - 1) * tl.exp(lq) * (logs + other)
    elif KIND == TOTAL_VARIATION:
        p, q = tl.exp(lp), tl.exp(lq)
        g = -0.5 * q * (tl.where(p > q, 1.0, tl.where(p < q, -1.0, 0.0)) - other)
    elif KIND == ADAPTIVE:
        p, q = tl.exp(lp), tl.exp(lq)
        g = extra * (q - p) + (1 - extra) * _times(q, lq - lp - other)
    elif KIND == POWER_MEAN:
        logs, part = _log_mean(lp, lq, share, exponent)
        g = (tl.exp(logs - lr) - tl.exp(lp)) * part - tl.exp(lq) * other
    else:
        g = extra * tl.exp(lq) - tl.where(chosen, 1.0, 0.0)
    return g


@triton.jit
def terms_kernel(
    z_pointer,  # [rows, *] student's products
    y_pointer,  # [rows, *] teacher's
    grad_pointer,  # [rows, *] may be z
    label_pointer,  # [rows], -1 where there is none
    factor_pointer,  # [rows]
    lse_pointer,  # [rows, distributions, 2]: the largest logit, and the logarithm of the sum beside it
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
                lq = _normalise(s * cooling, lse_pointer, OF_STUDENT[i])
            if OF_TEACHER[i] >= 0:
                lp = _normalise(t * cooling, lse_pointer, OF_TEACHER[i])
            if OF_THIRD[i] >= 0:
                if KINDS[i] == POWER_MEAN:
                    lr = -_normalise(tl.zeros([BLOCK], DTYPE), lse_pointer, OF_THIRD[i])
                else:
                    lr = _normalise(_interpolate(s, t, share) * cooling, lse_pointer, OF_THIRD[i])
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
