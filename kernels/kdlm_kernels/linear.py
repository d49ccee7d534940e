"""Divergences and log-probabilities from hidden states and heads, without a `[rows, vocab]` tensor."""

from collections.abc import Sequence
from typing import Any, overload

from torch import Tensor
from torch.distributed import ProcessGroup

from kdlm_kernels.formulas import Plan
from kdlm_kernels.heads import Head, HeadLike, as_head, shape_of
from kdlm_kernels.merging import Here, Merge
from kdlm_kernels.row_part import FusedRows, Impl, implementation
from kdlm_kernels.sharding import Shards, opened, whole
from kdlm_kernels.sparse_rows import LogProbs, SparseRows
from kdlm_kernels.sweep import Job, results_of, sweep
from kdlm_kernels.terms import MEASURED, MEASURES, Term, unique_names

AnyHead = HeadLike | Tensor | None


@overload
def linear_divergence(
    student_hidden: Tensor,
    student_head: AnyHead,
    teacher_hidden: Tensor | None = None,
    teacher_head: AnyHead = None,
    *,
    measures: None = None,
    **rest: Any,
) -> Tensor: ...
@overload
def linear_divergence(
    student_hidden: Tensor,
    student_head: AnyHead,
    teacher_hidden: Tensor | None = None,
    teacher_head: AnyHead = None,
    *,
    measures: Sequence[str],
    **rest: Any,
) -> tuple[Tensor, dict[str, Tensor]]: ...
def linear_divergence(
    student_hidden: Tensor,
    student_head: AnyHead,
    teacher_hidden: Tensor | None = None,
    teacher_head: AnyHead = None,
    *,
    divergence: str | Sequence[Term] = "forward_kl",
    labels: Tensor | None = None,
    vocab: int | None = None,
    weights: Tensor | None = None,
    measures: Sequence[str] | None = None,
    chunk_rows: int | None = None,
    impl: Impl = "auto",
    group: ProcessGroup | None = None,
    **options: Any,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    """Return the divergence of every row, differentiable in the student's hidden states, head and bias.

        loss = linear_divergence(h_s, model.lm_head.weight, h_t, teacher.lm_head.weight,
                                 divergence="reverse_kl", temperature=2.0).sum() / count

    Four matrix products and a few passes over one chunk's logits, all in forward: the gradient is made while the
    logits are there, and backward multiplies it by what comes from above. Where that differs from row to row,
    everything is done again in backward, which is right and takes twice the time: factors that are known before go
    into `weights`.

    Args:
        student_hidden, teacher_hidden: `[rows, width]`, each with its own width; the kept positions only.
        student_head, teacher_head: weight `[vocab, width]`, or a `Head` (or anything with its attributes) with bias,
            logit scale or softcap; None: the hidden states are logits already.
        divergence: a name (`forward_kl`, `reverse_kl`, `skew_kl`, `skew_reverse_kl`, `generalised_jsd`,
            `total_variation`, `adaptive_kl`, `alpha_mixture`, `taid_kl`, `cross_entropy`), with `temperature`,
            `t_squared` and its own options as keywords; or several `Term`s, whose weighted sum is one pass.
        labels: the next token of each row, for cross-entropy and for measures that look at it. With -100 a row's
            cross-entropy is 0.
        vocab: compare the first `vocab` ids only, where a head has more rows than the tokenizers share.
        weights: factor of each row, without gradient.
        measures: watch these too, without gradient, among `student_entropy`, `top1_agreement`, `accuracy` and
            `teacher_cross_entropy`; an empty list asks for the terms alone.
        chunk_rows: rows projected at once; by default what `plan_chunks` says.
        impl: "triton" (CUDA), "torch" (anywhere), or the better of those that can run.
        group: the heads (or logits) are this rank's slice of the vocabulary, in the order of the group's ranks (tensor
            parallelism), and student's and teacher's begin at the same ids; hidden states and labels are the same on
            all ranks, and so are the results.

    Returns:
        `[rows]` in nats, in fp32 (float64 for float64), times temperature^2 unless told otherwise. With `measures`
        also `{name: [rows]}`: each term without its weight, and each measure.

    Logits and the head's gradient are fp32 whatever the dtype of the models. A head that is frozen gets, and
    allocates, no gradient. An FSDP2 `DTensor` is gathered once per call, and a frozen ZeRO-3 partition too. Raises
    ValueError for names, options and shapes that do not fit, RuntimeError when differentiated twice.
    """
    terms, chosen = _terms(divergence, options), _check_measures(measures or ())
    if not _listens(terms, chosen):
        teacher_hidden = teacher_head = None
    student, teacher = whole(as_head(student_head)), whole(as_head(teacher_head))
    with opened(student, teacher):
        merge = _merge(group, (student_hidden, student), (teacher_hidden, teacher))
        plan = _plan(terms, chosen, (student_hidden, student), (teacher_hidden, teacher), vocab, merge)
        _check(plan, student_hidden, teacher_hidden, labels, weights)
        rows = FusedRows(plan, terms, labels, implementation(impl, student_hidden.device), merge)
        given = None if teacher_hidden is None else (teacher_hidden.detach(), teacher)
        job = Job(rows, student, given, _detached(weights), chunk_rows, merge)
        values, parts = sweep(job, student_hidden)
    if measures is None:
        return values
    # Without rows nothing has run, and the names are still wanted: ranks must log alike.
    return values, parts or {name: values.detach().clone() for name in (*plan.names, *plan.comparisons)}


def linear_topk_divergence(
    student_hidden: Tensor,
    student_head: AnyHead,
    ids: Tensor,
    log_probs: Tensor | None = None,
    counts: Tensor | None = None,
    *,
    divergence: str | Sequence[Term] = "forward_kl",
    labels: Tensor | None = None,
    weights: Tensor | None = None,
    measures: Sequence[str] | None = None,
    chunk_rows: int | None = None,
    impl: Impl = "auto",
    group: ProcessGroup | None = None,
    **options: Any,
) -> Any:
    """Return the divergence of every row from a teacher known by some of its tokens: only the student is projected.

    With `log_probs` the k tokens and all the rest as one bucket are compared on both sides, `(p_1 .. p_k, tail)` with
    `(q_1 .. q_k, tail)`: a lower bound of the divergence for every f-divergence, and unbiased in what it asks for.
    With `counts` the tokens are samples and forward KL becomes `-sum share log q` (arXiv 2503.16870), whose gradient
    is unbiased and whose value has the teacher's entropy in it.

    Args:
        ids: `[rows, k]`, different ones in each row where they come with `log_probs`. An id beyond the student's
            vocabulary counts as tail on both sides.
        log_probs: `[rows, k]`, natural, of the whole softmax at temperature 1 (not renormalised).
        counts: `[rows, k]`, importance-weighted number of draws; 0 pads.
        divergence: as in `linear_divergence`, at temperature 1; with `counts` `forward_kl` and `cross_entropy` only.
        measures: `student_entropy`, `accuracy`.

    The other arguments, the result and the errors are those of `linear_divergence`.
    """
    terms = _terms(divergence, options)
    if (log_probs is None) == (counts is None):
        raise ValueError("give either log_probs (top-k) or counts (samples)")
    student = whole(as_head(student_head))
    chosen = _check_measures(measures or ())
    with opened(student):
        merge = _merge(group, (student_hidden, student))
        impl = implementation(impl, student_hidden.device)
        rows = SparseRows(terms, chosen, shape_of(student), ids, log_probs, counts, labels, impl, merge)
        _check_rows(student_hidden, ids=ids, log_probs=log_probs, counts=counts, labels=labels, weights=weights)
        values, parts = sweep(Job(rows, student, None, _detached(weights), chunk_rows, merge), student_hidden)
    if measures is None:
        return values
    return values, parts or {name: values.detach().clone() for name in rows.all_names}


def linear_logprobs(
    student_hidden: Tensor,
    student_head: AnyHead,
    ids: Tensor,
    *,
    temperature: float = 1.0,
    chunk_rows: int | None = None,
    impl: Impl = "auto",
    group: ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """Return `log q(id)` for `ids` `[rows, k]`, and the entropy `[rows]`: what policy-gradient losses are made of.

    Both are differentiable in hidden states, head and bias. What comes from above is known in backward only, so the
    student is projected there again: four products instead of three, in the memory of one chunk.

    Raises ValueError for an id outside the vocabulary. The other arguments are those of `linear_divergence`.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    student = whole(as_head(student_head))
    with opened(student):
        merge = _merge(group, (student_hidden, student))
        _check_rows(student_hidden, ids=ids)
        _check_ids(ids, merge.total(0, _ids(student_hidden, student)))
        impl = implementation(impl, student_hidden.device)
        wanted = LogProbs(ids, shape_of(student), temperature, impl, merge)
        log_probs, entropy = results_of(wanted, Job(None, student, None, None, chunk_rows, merge), student_hidden)
    return log_probs, entropy


def _terms(divergence: str | Sequence[Term], options: dict[str, Any]) -> list[Term]:
    """Return the terms; the options are those of the only one."""
    if isinstance(divergence, str):
        return [Term.named(divergence, **options)]
    if options:
        raise ValueError(f"{', '.join(options)}: with a list of terms, options belong into the Term")
    return list(divergence)


def _listens(terms: Sequence[Term], measures: Sequence[str]) -> bool:
    """Whether anything looks at the teacher; else it is not projected."""
    return any(term.formula.needs_teacher for term in terms) or not {"student_entropy", "accuracy"} >= set(measures)


def _plan(
    terms: Sequence[Term],
    measures: Sequence[str],
    student: tuple[Tensor, Head | None],
    teacher: tuple[Tensor | None, Head | None],
    vocab: int | None,
    merge: Merge,
) -> Plan:
    """Describe the call; raise ValueError where the vocabularies cannot be compared."""
    sizes = {"student": _ids(*student)}
    if teacher[0] is not None:
        sizes["teacher"] = _ids(teacher[0], teacher[1])
    totals = {name: merge.total(which, ids) for which, (name, ids) in enumerate(sizes.items())}
    if vocab is None and len(set(totals.values())) > 1:
        raise ValueError(
            f"the student scores {totals['student']} ids and the teacher {totals['teacher']}: pass vocab=, the number "
            "of ids that their tokenizers share"
        )
    for name, total in totals.items():
        if vocab is not None and not 0 < vocab <= total:
            raise ValueError(f"vocab={vocab}, but the {name} scores {total} ids")
    shared = totals["student"] if vocab is None else vocab
    sums = [name for name in measures if name in MEASURED]
    return Plan(
        formulas=(*(term.formula for term in terms), *(MEASURED[name] for name in sums)),
        names=(*unique_names(terms), *sums),
        comparisons=tuple(name for name in measures if name not in MEASURED),
        student=shape_of(student[1]),
        teacher=shape_of(teacher[1]),
        shared=min(max(shared - merge.offset, 0), *sizes.values()),
        whole=shared == totals["student"],
    )


def _ids(hidden: Tensor, head: Head | None) -> int:
    return hidden.shape[-1] if head is None else len(head.weight)


def _check_measures(measures: Sequence[str]) -> tuple[str, ...]:
    for name in measures:
        if name not in MEASURES:
            raise ValueError(f"unknown measure {name!r}: there are {', '.join(MEASURES)}")
    return tuple(measures)


def _check(plan: Plan, student: Tensor, teacher: Tensor | None, labels: Tensor | None, weights: Tensor | None) -> None:
    """Raise ValueError where a formula misses its input, or rows do not match."""
    for formula, name in zip(plan.formulas, plan.names, strict=True):
        if formula.needs_labels and labels is None:
            raise ValueError(f"{name} needs labels=, the next token of each row")
        if formula.needs_teacher and teacher is None:
            raise ValueError(f"{name} needs the teacher's hidden states")
    if "accuracy" in plan.comparisons and labels is None:
        raise ValueError("accuracy needs labels=, the next token of each row")
    if "top1_agreement" in plan.comparisons and teacher is None:
        raise ValueError("top1_agreement needs the teacher's hidden states")
    _check_rows(student, teacher_hidden=teacher, labels=labels, weights=weights)


def _check_rows(student: Tensor, **others: Tensor | None) -> None:
    """Raise ValueError where a tensor does not have one row per hidden state."""
    if student.ndim != 2:
        raise ValueError(
            f"student_hidden must be [rows, width], got {list(student.shape)}: flatten, keep the kept rows"
        )
    for name, other in others.items():
        if other is not None and len(other) != len(student):
            raise ValueError(f"student_hidden has {len(student)} rows, {name} {len(other)}")


def _check_ids(ids: Tensor, vocab: int) -> None:
    """Raise ValueError for an id outside the vocabulary. Waits for the device, far shorter than a sweep."""
    outside = ids[(ids < 0) | (ids >= vocab)]
    if len(outside):
        raise ValueError(f"id {int(outside[0])} is outside the vocabulary of {vocab}")


def _merge(group: ProcessGroup | None, *models: tuple[Tensor | None, Head | None]) -> Merge:
    if group is None:
        return Here()
    given = [(hidden, head) for hidden, head in models if hidden is not None]
    return Shards(group, [_ids(hidden, head) for hidden, head in given], given[0][0].device)


def _detached(weights: Tensor | None) -> Tensor | None:
    return None if weights is None else weights.detach()
