"""Vocabularies of different size: both sides are cut to the ids that the tokenizers share, before the softmax."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kdlm.signal import IGNORE_INDEX, Dense, Hidden, Mixture, Sampled, Signal, TopK

Vocab = int | Int[Tensor, "shared"] | None
"""Shared token ids: all (None), the first n, or a rising list of ids that mean the same token in both tokenizers."""


def cut(logits: Float[Tensor, "*rows vocab"], vocab: Vocab) -> Float[Tensor, "*rows shared"]:
    """Return the logits of the shared ids: a view for the first n."""
    if vocab is None:
        return logits
    return logits[..., :vocab] if isinstance(vocab, int) else logits.index_select(-1, vocab)


def label_places(labels: Int[Tensor, "*rows"], vocab: Vocab) -> Int[Tensor, "*rows"]:
    """Return where among the shared ids each label is, and IGNORE_INDEX for one that is none of them."""
    if vocab is None:
        return labels
    if isinstance(vocab, int):
        return labels.where(labels < vocab, IGNORE_INDEX)
    place = torch.searchsorted(vocab, labels).clamp(max=len(vocab) - 1)
    return place.where(vocab[place] == labels, IGNORE_INDEX)


def whole(teacher: Signal | None) -> tuple[Dense | Hidden, ...]:
    """Return the whole distributions that a teacher's signal is made of: itself, or the members of a mixture."""
    if isinstance(teacher, Mixture):
        return teacher.members
    return (teacher,) if isinstance(teacher, Dense | Hidden) else ()


def check(student: Dense | Hidden, teacher: Signal | None, vocab: Vocab) -> None:
    """Raise ValueError where the two cannot be compared on `vocab`."""
    ours = student.vocab_size
    theirs = [one.vocab_size for one in whole(teacher)]
    if vocab is None and (other := next((ids for ids in theirs if ids != ours), None)):
        raise ValueError(
            f"the student scores {ours} ids and the teacher {other}: pass vocab=, the number of ids that their "
            "tokenizers share (or the ids themselves)"
        )
    for name, ids in [("student", ours), *(("teacher", ids) for ids in theirs)]:
        if isinstance(vocab, int) and not 0 < vocab <= ids:
            raise ValueError(f"vocab={vocab}, but the {name} scores {ids} ids")
    if isinstance(vocab, Tensor) and isinstance(teacher, TopK | Sampled):
        raise ValueError(
            f"a {type(teacher).__name__} signal with a list of shared ids: its ids count the teacher's whole "
            "vocabulary; capture it over the shared ids and pass their number"
        )


def narrow_teacher(teacher: Signal | None, vocab: Vocab) -> Signal | None:
    """Cut a teacher's head before its product where that is free: the first n rows of a head are a view."""
    if isinstance(vocab, int) and isinstance(teacher, Hidden | Mixture):
        return teacher.cut(vocab)
    return teacher
