"""Any per-row loss from hidden states and heads, without a `[rows, vocab]` tensor."""

from collections.abc import Callable
from typing import Any

from jaxtyping import Float, Shaped
from kdlm_kernels.row_part import Impl
from torch import Tensor

from kdlm.losses import vocabulary
from kdlm.losses.fused import fused
from kdlm.losses.sweep import sweep
from kdlm.losses.vocabulary import Vocab, cut
from kdlm.signal import Dense, Hidden, Signal


def chunked(
    loss: Callable[..., Any],
    student: Hidden | Dense,
    teacher: Signal | None,
    *rowwise: Shaped[Tensor, "rows *rest"],
    vocab: Vocab = None,
    weights: Float[Tensor, "rows"] | None = None,
    chunk_rows: int | None = None,
    has_aux: bool = False,
    impl: Impl = "auto",
) -> Any:
    """Return `loss` of every row, differentiable in the student's hidden states, head and bias (or its logits).

    `loss(student_logits, teacher, *rowwise)` gets a few rows at a time: logits `[n, vocab]` in at least fp32, the
    teacher's logits without gradient (or its `TopK` or `Sampled` of these rows, or None) and the same rows of each
    tensor in `rowwise`; it returns `[n]`, or `([n], {name: [n]})` with `has_aux`, and must not mix rows.

    Args:
        vocab: ids shared by both tokenizers, to which both sides are cut before they reach `loss`; labels in `rowwise`
            are not touched (see `label_places`).
        weights: factor of each row, without gradient.
        chunk_rows: rows projected at once; by default as many as pay, within 320 MiB (CPU) or 1 GiB (CUDA).
        impl: "triton" (fused kernels, CUDA), "torch", or "auto", the better of those that can run. A divergence of
            kdlm, or a `partial` of one, runs as a formula with its gradient written out, in either; any other loss
            runs eagerly, and has no "triton".

    Returns:
        `[rows]` in at least fp32, or `([rows], {name: [rows]})`, the second without gradient.

    Heads in bf16 or fp16 give fp32 logits, and their gradient is accumulated in fp32. A frozen head gets, and
    allocates, no gradient. Differentiating twice raises RuntimeError. Raises ValueError where the vocabularies cannot
    be compared or `loss` does not return one value per row.
    """
    vocabulary.check(student, teacher, vocab)
    call = {"weights": weights, "chunk_rows": chunk_rows, "impl": impl}
    if not rowwise and not has_aux:
        done = fused([(loss, 1.0)], student, teacher, None, vocab=vocab, **call)
        if done is not None:
            return done[0]

    def on_shared(student_logits: Tensor, teacher_rows: Any, *rest: Tensor) -> Any:
        return loss(cut(student_logits, vocab), teacher_rows, *rest)

    whole = loss if vocab is None else on_shared
    return sweep(whole, student, teacher, *rowwise, vocab=vocab, has_aux=has_aux, **call)
