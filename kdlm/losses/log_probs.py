"""Log-probabilities of the text's own tokens: what losses on sampled tokens are made of."""

from typing import Any

import torch
from jaxtyping import Float, Int
from kdlm_kernels import linear_logprobs
from kdlm_kernels.row_part import Impl
from torch import Tensor

from kdlm.losses.distributions import log_probs as log_softmax
from kdlm.losses.measures import label_log_p
from kdlm.losses.slices import sliced
from kdlm.losses.sweep import sweep
from kdlm.losses.vocabulary import Vocab, label_places, whole
from kdlm.signal import Dense, Hidden, LogProbs, Mixture, Signal, TopK


def token_log_probs(
    student: Hidden | Dense,
    labels: Int[Tensor, "rows"],
    *,
    temperature: float = 1.0,
    chunk_rows: int | None = None,
    impl: Impl = "auto",
) -> tuple[Float[Tensor, "rows"], Float[Tensor, "rows"]]:
    """Return `log q(label)` and the entropy of q on each row, in nats, over the student's whole vocabulary.

    `temperature` divides the logits. Both results are differentiable, in the memory of one chunk of rows: the logits
    are made again in backward. The vocabulary is whole because that is what tokens are drawn from. Raises ValueError
    for a label outside of it.
    """
    ours, _, group = sliced(student, None)
    source, head = (ours.hidden, ours.head) if isinstance(ours, Hidden) else (ours.logits, None)
    call: dict[str, Any] = {"temperature": temperature, "chunk_rows": chunk_rows, "impl": impl, "group": group}
    log_probs, entropy = linear_logprobs(source, head, labels[:, None], **call)
    return log_probs[:, 0], entropy


@torch.no_grad()
def teacher_log_probs(
    teacher: Signal | None,
    labels: Int[Tensor, "rows"],
    *,
    vocab: Vocab = None,
    temperature: float = 1.0,
    chunk_rows: int | None = None,
    impl: Impl = "auto",
) -> Float[Tensor, "rows"]:
    """Return `log p(label)` of each row over the ids in `vocab`, without gradient; -inf for a label that is none.

    `temperature` divides the logits. A teacher may also say just these numbers (`LogProbs`), at temperature 1. Raises
    ValueError for signals in which some labels are not: of those outside the `TopK` only their sum is known, and
    `Sampled` has other draws.
    """
    if isinstance(teacher, LogProbs):
        if temperature != 1.0:
            raise ValueError(f"temperature {temperature:g}: this teacher scores tokens at temperature 1 only")
        return teacher.log_probs
    if not isinstance(teacher, Hidden | Dense | Mixture):
        given = "no teacher" if teacher is None else f"a {type(teacher).__name__} signal"
        raise ValueError(
            "the log-probability of each sampled token is wanted, which takes a signal of Dense, Hidden, LogProbs or "
            f"Mixture, got {given}"
        )
    call: dict[str, Any] = {"chunk_rows": chunk_rows, "impl": impl}
    if isinstance(teacher, Mixture) or isinstance(vocab, Tensor):
        # The sweep wants a student: one that scores a single id costs nothing.
        first = whole(teacher)[0]
        nobody = Dense((first.hidden if isinstance(first, Hidden) else first.logits).new_zeros(len(labels), 1))

        def of_rows(_: Tensor, logits: Tensor, rows: Tensor) -> Tensor:
            places = label_places(rows, logits.shape[-1] if vocab is None else vocab)
            return label_log_p(log_softmax(logits, temperature), places)

        return sweep(of_rows, nobody, teacher, labels, vocab=vocab, **call)
    shared = teacher if vocab is None else teacher.cut(vocab)
    known = labels < shared.vocab_size
    log_probs, _ = token_log_probs(shared, labels.where(known, 0), temperature=temperature, **call)
    return log_probs.masked_fill(~known, -torch.inf)


def label_log_probs(teacher: TopK, labels: Int[Tensor, "rows"]) -> Float[Tensor, "rows"]:
    """Return `log p(label)` of the rows whose label is among the k tokens; -inf for the others, whose share of the tail
    nobody knows. Without gradient."""
    here = teacher.ids == labels[:, None]
    found = teacher.log_probs.detach().float().masked_fill(~here, -torch.inf)
    return found.amax(-1)
