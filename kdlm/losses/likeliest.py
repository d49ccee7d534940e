"""The most probable tokens of student and teacher, chunk by chunk: to look at, or to compare at these alone."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from kdlm_kernels import linear_logprobs
from kdlm_kernels.row_part import Impl
from torch import Tensor

from kdlm.losses import vocabulary
from kdlm.losses.distributions import log_probs
from kdlm.losses.loss import TeacherRows
from kdlm.losses.slices import sliced
from kdlm.losses.sweep import sweep
from kdlm.losses.vocabulary import Vocab
from kdlm.signal import Dense, Hidden, Mixture, Signal, TopK


@dataclass(frozen=True)
class Likeliest:
    """Token ids of each row, the most probable first, and their probabilities."""

    ids: Int[Tensor, "rows count"]
    probabilities: Float[Tensor, "rows count"]


@torch.no_grad()
def likeliest(
    student: Hidden | Dense,
    teacher: Signal | None,
    count: int,
    *,
    vocab: Vocab = None,
    chunk_rows: int | None = None,
) -> tuple[Likeliest, Likeliest | None]:
    """Return the `count` most probable tokens of both on each row, at temperature 1.

    The student's over its whole vocabulary, the teacher's over the shared ids; of a `TopK` no more than it has. None
    for a teacher that gives no distribution. Raises ValueError where the vocabularies cannot be compared.
    """
    heard = teacher if isinstance(teacher, Dense | Hidden | Mixture | TopK) else None
    vocabulary.check(student, heard, vocab)

    def both(logits: Tensor, theirs: TeacherRows) -> tuple[Tensor, dict[str, Tensor]]:
        found = {"student": _top(log_probs(logits, 1.0), count)}
        if isinstance(theirs, TopK):
            found["teacher"] = _top(theirs.log_probs, count, theirs.ids)
        elif isinstance(theirs, Tensor):
            found["teacher"] = _top(log_probs(theirs, 1.0), count, vocab if isinstance(vocab, Tensor) else None)
        # A sweep carries one number a row for each name; float32 holds ids up to 2^24 as they are.
        aux = {f"{side}/{place}": value for side, (p, ids) in found.items() for place, value in enumerate((*p, *ids))}
        return logits.new_zeros(len(logits)), aux

    _, aux = sweep(both, student, heard, vocab=vocab, chunk_rows=chunk_rows, has_aux=True, impl="torch")
    ours, theirs = (_collected(aux, side) for side in ("student", "teacher"))
    if ours is None:  # no rows, so nothing has run
        ours = Likeliest(torch.zeros(0, count, dtype=torch.long), torch.zeros(0, count))
    return ours, theirs


@torch.no_grad()
def told_of_likeliest(
    student: Hidden | Dense,
    teacher: Signal | None,
    count: int,
    *,
    chunk_rows: int | None = None,
    impl: Impl = "auto",
) -> TopK:
    """Return what a teacher says of the `count` tokens that the *student* finds most probable, on each row.

    Divergences of such a signal compare these tokens and one bucket for all others, as SDPO has it (arXiv 2601.20802):
    a lower bound, tight where the student is sure. Tokens that the teacher does not know have log-probability -inf.
    Raises ValueError for a teacher that gives no whole distribution.
    """
    if not isinstance(teacher, Hidden | Dense):
        given = "no teacher" if teacher is None else f"a {type(teacher).__name__} signal"
        raise ValueError(f"the teacher's log-probability of any token is wanted: Dense or Hidden, got {given}")
    ours, _, group = sliced(teacher, None)
    source, head = (ours.hidden, ours.head) if isinstance(ours, Hidden) else (ours.logits, None)
    ids = likeliest(student, None, min(count, student.vocab_size), chunk_rows=chunk_rows)[0].ids.to(source.device)
    known = ids < teacher.vocab_size
    call: dict[str, Any] = {"chunk_rows": chunk_rows, "impl": impl, "group": group}
    log_p, _ = linear_logprobs(source, head, ids.where(known, 0), **call)
    return TopK(ids, log_p.masked_fill(~known, -torch.inf))


def _top(log_p: Tensor, count: int, ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return probabilities and ids `[count, rows]`; `ids` are those of the places, for all rows or for each."""
    top = log_p.topk(min(count, log_p.shape[-1]))
    places = top.indices
    if ids is not None:
        places = ids[places] if ids.ndim == 1 else ids.gather(-1, places)
    return top.values.exp().T, places.T


def _collected(aux: dict[str, Tensor], side: str) -> Likeliest | None:
    columns = [value for name, value in aux.items() if name.startswith(f"{side}/")]
    if not columns:
        return None
    half = len(columns) // 2
    return Likeliest(torch.stack(columns[half:], 1).long(), torch.stack(columns[:half], 1))
