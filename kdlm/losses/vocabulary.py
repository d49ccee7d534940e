"""Vocabularies of different size: both sides are cut to the ids that the tokenizers share, before the softmax."""

from dataclasses import replace

from jaxtyping import Float, Int
from torch import Tensor

from kdlm.signal import Dense, Hidden, Sampled, Signal, TopK

Vocab = int | Int[Tensor, "shared"] | None
"""Shared token ids: all (None), the first n, or a rising list of ids that mean the same token in both tokenizers."""


def cut(logits: Float[Tensor, "*rows vocab"], vocab: Vocab) -> Float[Tensor, "*rows shared"]:
    """Return the logits of the shared ids: a view for the first n."""
    if vocab is None:
        return logits
    return logits[..., :vocab] if isinstance(vocab, int) else logits.index_select(-1, vocab)


def size(prediction: Dense | Hidden) -> int:
    """Return the number of ids that a prediction scores."""
    return prediction.head.vocab_size if isinstance(prediction, Hidden) else prediction.logits.shape[-1]


def check(student: Dense | Hidden, teacher: Signal | None, vocab: Vocab) -> None:
    """Raise ValueError where the two cannot be compared on `vocab`."""
    whole = isinstance(teacher, Dense | Hidden)
    sizes = {"student": size(student)} | ({"teacher": size(teacher)} if whole else {})
    if vocab is None and len(set(sizes.values())) > 1:
        raise ValueError(
            f"the student scores {sizes['student']} ids and the teacher {sizes['teacher']}: pass vocab=, the number "
            "of ids that their tokenizers share (or the ids themselves)"
        )
    for name, ids in sizes.items():
        if isinstance(vocab, int) and not 0 < vocab <= ids:
            raise ValueError(f"vocab={vocab}, but the {name} scores {ids} ids")
    if isinstance(vocab, Tensor) and isinstance(teacher, TopK | Sampled):
        raise ValueError(
            f"a {type(teacher).__name__} signal with a list of shared ids: its ids count the teacher's whole "
            "vocabulary; capture it over the shared ids and pass their number"
        )


def narrow_teacher(teacher: Signal | None, vocab: Vocab) -> Signal | None:
    """Cut a teacher's head before its product where that is free: the first n rows of a head are a view."""
    if isinstance(teacher, Hidden) and isinstance(vocab, int):
        return replace(teacher, head=teacher.head.cut(vocab))
    return teacher
