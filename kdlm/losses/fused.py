"""Which losses have a formula in `kdlm_kernels`, and how they get there; the others run eagerly (see `sweep`)."""

from collections.abc import Callable, Sequence
from functools import partial
from types import FunctionType
from typing import Any

from kdlm_kernels import Term, linear_divergence, linear_topk_divergence, plan_chunks
from torch import Tensor

from kdlm.losses.adaptive import AdaptiveKL, adaptive_kl
from kdlm.losses.cross_entropy import CrossEntropy
from kdlm.losses.jsd import JSD, generalised_jsd
from kdlm.losses.kl import ForwardKL, ReverseKL, forward_kl, reverse_kl
from kdlm.losses.mixture import AlphaMixture, alpha_mixture
from kdlm.losses.skew import SkewKL, SkewReverseKL, skew_kl, skew_reverse_kl
from kdlm.losses.slices import sliced
from kdlm.losses.taid import TowardsTeacher, taid_kl
from kdlm.losses.tvd import TVD, total_variation
from kdlm.losses.vocabulary import Vocab
from kdlm.signal import Dense, Hidden, Mixture, Sampled, Signal, TopK

__all__ = ["as_term", "fused", "plan_chunks"]

_FUNCTIONS = {
    forward_kl,
    reverse_kl,
    skew_kl,
    skew_reverse_kl,
    generalised_jsd,
    total_variation,
    adaptive_kl,
    alpha_mixture,
    taid_kl,
}
"""Functions that the kernels know by the same name, with the same options."""
_DIVERGENCES = (ForwardKL, ReverseKL, SkewKL, SkewReverseKL, JSD, TVD, AdaptiveKL, AlphaMixture)
_AS_TERMS = {"cross_entropy": "cross_entropy", "kl_to_teacher": "forward_kl", "reverse_kl_to_teacher": "reverse_kl"}
"""Measures that are terms of weight 0."""
_COUNTED = {*_AS_TERMS, "student_entropy", "accuracy", "top1_agreement", "teacher_cross_entropy"}
"""Measures that the kernels take."""
_OF_SAMPLES = ("forward_kl", "cross_entropy")
_OF_FEW = ("student_entropy", "accuracy")
"""What the kernels do with a teacher that gives samples, and measure with one that gives a few tokens."""


def as_term(loss: Callable[..., Any], weight: float = 1.0) -> Term | None:
    """Return the kernels' description of a loss, a pure function or a `partial` of one; None where there is none.

    A subclass may compute anything, so only the losses themselves count.
    """
    if type(loss) in _DIVERGENCES:
        return Term.named(loss.divergence.__name__, weight, **loss.options())
    if type(loss) is CrossEntropy:
        return Term("cross_entropy", weight)
    if type(loss) is TowardsTeacher:
        return Term("taid_kl", weight, options={"t": loss.t})
    function, options = (loss.func, loss.keywords) if isinstance(loss, partial) and not loss.args else (loss, {})
    return (
        Term.named(function.__name__, weight, **options)
        if isinstance(function, FunctionType) and function in _FUNCTIONS
        else None
    )


def _with_entropy(
    constant: Tensor, total: Tensor, parts: dict[str, Tensor], terms: Sequence[Term], weights: Tensor | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Turn forward KL on samples, a cross-entropy, into the divergence, by what the teacher's side adds."""
    names = dict(zip(parts, terms, strict=False))  # terms come first
    added = sum(term.weight for term in terms if term.name == "forward_kl") * constant
    of_parts = {
        name: value + constant.to(value) if name in names and names[name].name == "forward_kl" else value
        for name, value in parts.items()
    }
    return total + (added if weights is None else added * weights).to(total), of_parts


def fused(
    losses: Sequence[tuple[Callable[..., Any], float]],
    student: Hidden | Dense,
    teacher: Signal | None,
    labels: Tensor | None,
    *,
    vocab: Vocab,
    measures: Sequence[str] = (),
    **call: Any,
) -> tuple[Tensor, list[Tensor]] | None:
    """Return the weighted sum of the losses and, in order, each loss and each measure; None where a part has no kernel.

    `call` are `weights`, `chunk_rows` and `impl` of the kernels' functions.
    """
    terms = [term for loss, weight in losses if (term := as_term(loss, weight)) is not None]
    if len(terms) < len(losses) or isinstance(vocab, Tensor) or isinstance(teacher, Mixture):
        return None
    if not set(measures) <= _COUNTED:
        return None
    terms += [Term(_AS_TERMS[name], 0.0) for name in measures if name in _AS_TERMS]
    others = [name for name in measures if name not in _AS_TERMS]
    ids = student.vocab_size
    student, teacher, call["group"] = sliced(student, teacher)
    source, head = (student.hidden, student.head) if isinstance(student, Hidden) else (student.logits, None)
    if isinstance(teacher, TopK | Sampled):
        known = isinstance(teacher, TopK) or all(term.name in _OF_SAMPLES for term in terms)
        if not known or vocab not in (None, ids) or not set(others) <= set(_OF_FEW):
            return None
        if isinstance(teacher, TopK) and teacher.draws is not None and any(term.name == "forward_kl" for term in terms):
            if any(term.name not in _OF_SAMPLES for term in terms):
                return None  # some of them look at the draws and some at the bucket
            target, constant = teacher.spread()
            few = {"ids": target.ids, "counts": target.counts}
        else:
            constant = None
            few = {"log_probs": teacher.log_probs} if isinstance(teacher, TopK) else {"counts": teacher.counts}
            few["ids"] = teacher.ids
        total, parts = linear_topk_divergence(
            source, head, **few, divergence=terms, labels=labels, measures=others, **call
        )
        if constant is not None:
            total, parts = _with_entropy(constant, total, parts, terms, call.get("weights"))
    else:
        if isinstance(teacher, Hidden):
            theirs = teacher.hidden, teacher.head
        else:
            theirs = (None if teacher is None else teacher.logits), None
        total, parts = linear_divergence(
            source, head, *theirs, divergence=terms, labels=labels, vocab=vocab, measures=others, **call
        )
    values = iter(parts.values())  # terms first, then the other measures, each in its order
    of_losses = [next(values) for _ in losses]
    by_name = {name: next(values) for name in measures if name in _AS_TERMS} | {name: parts[name] for name in others}
    return total, of_losses + [by_name[name] for name in measures]
