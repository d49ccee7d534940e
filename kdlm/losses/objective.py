"""The objective of token distillation: a weighted sum of losses, and what is measured beside it, in one pass."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from kdlm_kernels.row_part import Impl
from torch import Tensor

from kdlm.losses import measures as watching
from kdlm.losses import vocabulary
from kdlm.losses.fused import fused
from kdlm.losses.loss import TeacherRows
from kdlm.losses.sweep import sweep
from kdlm.losses.vocabulary import Vocab, cut, label_places
from kdlm.signal import Dense, Hidden, Signal

Term = tuple[str, Callable[..., Tensor], float]
"""Name, loss `(student_logits, teacher, labels) -> [rows]` (a `Loss` or any function) and weight now."""


def weighted_sum(
    terms: Sequence[Term],
    student: Hidden | Dense,
    teacher: Signal | None,
    labels: Int[Tensor, "rows"],
    *,
    vocab: Vocab = None,
    measures: Sequence[str] = (),
    chunk_rows: int | None = None,
    impl: Impl = "auto",
) -> tuple[Float[Tensor, "rows"], dict[str, Float[Tensor, "rows"]]]:
    """Return the weighted sum of the terms on each row, and every term (unweighted) and measure without gradient.

    Both heads are projected once, whatever the number of terms, and no `[rows, vocab]` tensor exists (see `chunked`).
    Terms with `full_vocabulary` (cross-entropy) see all of the student's logits, the others those of the ids in
    `vocab`, and labels that count those ids (`label_places`): IGNORE_INDEX where the label is none of them. A term of
    weight 0 is measured, and left out of the gradient. Raises ValueError for names that occur twice, a measure that
    does not exist or that the teacher cannot give, and vocabularies that do not match.
    """
    names = [name for name, _, _ in terms]
    if len(set(names)) < len(names):
        raise ValueError(f"terms need different names, got {names}: see numbered_names")
    if any(not getattr(term, "full_vocabulary", False) for _, term, _ in terms) or measures:
        vocabulary.check(student, teacher, vocab)
    kind = None if teacher is None else type(teacher)
    others = tuple(name for name in measures if name not in names)
    functions = watching.chosen(others, kind)
    pairs, call = [(loss, weight) for _, loss, weight in terms], {"chunk_rows": chunk_rows, "impl": impl}
    done = fused(pairs, student, teacher, labels, vocab=vocab, measures=others, **call)
    if done is not None:
        return done[0], dict(zip((*names, *others), done[1], strict=True))

    def total(full: Tensor, teacher_rows: TeacherRows, rows: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        value = torch.zeros(len(full), dtype=full.dtype, device=full.device)
        parts: dict[str, Tensor] = {}
        shared, places = cut(full, vocab), label_places(rows, vocab)
        for name, term, weight in terms:
            ours, own = (full, rows) if getattr(term, "full_vocabulary", False) else (shared, places)
            with torch.set_grad_enabled(torch.is_grad_enabled() and weight != 0):
                parts[name] = term(ours, teacher_rows, own)
            value = value + weight * parts[name] if weight else value
        return value, parts | watching.measure(functions, full, teacher_rows, rows, vocab)

    value, parts = sweep(total, student, teacher, labels, vocab=vocab, has_aux=True, **call)
    # Without rows no loss has run, and the names are still wanted: ranks must log alike.
    return value, parts or {name: value.detach().clone() for name in (*names, *functions)}
