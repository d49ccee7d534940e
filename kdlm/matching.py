"""Whether student, teacher, method and data fit together, asked before a run begins."""

from typing import Any

from kdlm.methods import Method
from kdlm.models import Predictor


def check_needs(method: Method, teacher: Any, provides: frozenset[str]) -> None:
    """Raise ValueError when the method needs what neither trainer nor teacher provides."""
    if "rollouts" in method.needs - provides:
        raise ValueError(f"{type(method).__name__} trains on the student's own text: use OnPolicyTrainer")
    if "rollouts" in method.needs and getattr(teacher, "known_text_only", False):
        raise ValueError(f"{type(teacher).__name__} knows given text only, and {type(method).__name__} trains on new")
    if "unmasking" in method.needs ^ provides and not method.any_text_model:
        masked, name = "unmasking" in provides, type(method).__name__
        raise ValueError(
            f"{name} is for causal language models, and the student is a masked one: use MaskedKD or GDSD"
            if masked
            else f"{name} is for masked language models, and the student is none: its config has no mask_token_id"
        )
    if "alignment" in method.needs - provides:
        raise ValueError(
            f"{type(method).__name__} compares two readings of the text: hand over the teacher's tokenizer too, as "
            "teacher_processing_class"
        )
    if "context" in method.needs - provides:
        raise ValueError(
            f"{type(method).__name__} tells the teacher more than the student: hand over rows with `asked` and "
            "`context`, or with `context_prompt` (see kdlm.data.contexts)"
        )
    provides = provides | (frozenset() if teacher is None else teacher.provides)
    if missing := sorted(method.needs - provides):
        given = "no teacher was given" if teacher is None else f"{type(teacher).__name__} does not provide it"
        raise ValueError(f"{type(method).__name__} needs {', '.join(missing)}, but {given}")


def check_answers(teacher: Any, *splits: Any) -> None:
    """Let a teacher that knows only some rows say so before the run begins; a stream's are seen when it comes to them.

    Raises ValueError, the teacher's own.
    """
    if not hasattr(teacher, "require"):
        return
    for split in splits:
        for rows in split.values() if isinstance(split, dict) else [split]:
            if hasattr(rows, "__len__"):
                teacher.require(rows)


TAKES = {
    True: "it takes preferences, and the data's rows are none: they need `prompt`, `chosen` and `rejected`",
    False: (
        "the data's rows are preferences, and it would train on the rejected side too: use redi, dpo or simpo, or say "
        "columns: {prompt: prompt, completion: chosen}"
    ),
}
"""What a method that wants preferences says of other rows, and any other method of preferences."""


def check_sides(method: Method, *splits: Any) -> None:
    """Raise ValueError where rows are preferences and the method wants none, or the reverse.

    Of a stream nothing is known before it is read.
    """
    wanted = "preferences" in method.needs
    for split in splits:
        for rows in split.values() if isinstance(split, dict) else [split]:
            if hasattr(rows, "__len__") and len(rows) and ("rejected" in rows[0]) != wanted:
                raise ValueError(f"{type(method).__name__}: {TAKES[wanted]}")


def common_vocab(views: dict[str, Any], tokenizer: Any) -> int | None:
    """Return how many ids to compare when the two heads are padded to different sizes, else None."""
    if not isinstance(views["student"], Predictor):
        return None
    theirs = getattr(views.get("teacher"), "vocab_size", None)
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # a processor holds one
    ours = views["student"].module.get_output_embeddings().weight.shape[0]
    if theirs is None or ours == theirs:
        return None
    return min(ours, theirs, len(tokenizer) if tokenizer is not None else ours)
