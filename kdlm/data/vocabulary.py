"""Vocabulary: can a student and a teacher be compared token by token, and on which token ids?

Decided by what each id means to the two tokenizers and never by sizes: heads are padded to round numbers, and two
vocabularies of one size may have nothing in common.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from kdlm.spelling import PROBE

EXAMPLES = 3
"""Disagreements that are named; the others are counted."""

SAMPLE = 1000
"""Ids whose text is probed."""


@dataclass(frozen=True)
class SharedVocabulary:
    """What two tokenizers share.

    Attributes:
        ids: the ids that mean the same token to both and are rows of both heads: n when they are exactly 0 .. n-1,
            else ascending. Padded rows of a head are never among them.
        identical: the two map the same tokens to the same ids, and tokenise alike.
        conflicts: why distributions over these vocabularies cannot be compared; empty when they can.
        differences: what deserves a warning: end-of-sequence tokens, chat templates, added tokens of one side.
    """

    ids: int | Int[Tensor, "shared"]
    identical: bool
    conflicts: tuple[str, ...]
    differences: tuple[str, ...]

    def __len__(self) -> int:
        return self.ids if isinstance(self.ids, int) else len(self.ids)

    def require(self) -> int | Int[Tensor, "shared"]:
        """Return `ids`; ValueError with examples when token-level distillation cannot work."""
        if self.conflicts:
            raise ValueError(
                "student and teacher do not share a tokenizer: "
                + "; ".join(self.conflicts)
                + ". Use a teacher of the student's family, or a method across tokenizers (alm, gold, uld, dskd, "
                "shared_vocabulary_kd, vocabulary_projection), or sequence_kd on text that the teacher wrote"
            )
        return self.ids


def shared_vocabulary(
    student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, student_rows: int, teacher_rows: int
) -> SharedVocabulary:
    """Compare two tokenizers whose models' heads have so many rows.

    Regular tokens have to agree, id by id, and text has to be split alike. Added tokens (special ones among them) may
    differ: the ids on which they do are left out.
    """
    ours = {token_id: token for token, token_id in student.get_vocab().items()}
    theirs = {token_id: token for token, token_id in teacher.get_vocab().items()}
    regular = (ours.keys() - student.added_tokens_decoder.keys()) | (
        theirs.keys() - teacher.added_tokens_decoder.keys()
    )
    unequal = sorted(i for i in ours.keys() | theirs.keys() if ours.get(i) != theirs.get(i))
    conflicts = _named("token ids disagree", [i for i in unequal if i in regular], ours, theirs)
    if not conflicts:
        conflicts = _probed(student, teacher, sorted(regular))
    shared = sorted(
        i for i in ours.keys() & theirs.keys() if ours[i] == theirs[i] and i < min(student_rows, teacher_rows)
    )
    whole = not shared or shared[-1] == len(shared) - 1
    return SharedVocabulary(
        ids=len(shared) if whole else torch.tensor(shared),
        identical=not unequal and not conflicts,
        conflicts=tuple(conflicts),
        differences=(
            *_named("added tokens differ", [i for i in unequal if i not in regular], ours, theirs),
            *_differences(student, teacher),
            *_too_few_rows("student", ours, student_rows),
            *_too_few_rows("teacher", theirs, teacher_rows),
        ),
    )


def intersection(shared: Sequence[int | Int[Tensor, "ids"]]) -> int | Int[Tensor, "shared"]:
    """Return the ids that several comparisons have in common, in the form that each of them has (see `ids`)."""
    if all(isinstance(ids, int) for ids in shared):
        return min(ids for ids in shared if isinstance(ids, int))
    lists = [set(range(ids)) if isinstance(ids, int) else set(ids.tolist()) for ids in shared]
    return torch.tensor(sorted(set.intersection(*lists)))


def _named(what: str, ids: list[int], ours: dict[int, str], theirs: dict[int, str]) -> list[str]:
    if not ids:
        return []
    examples = [
        f"id {i} is {_meaning(ours.get(i))} for the student, {_meaning(theirs.get(i))} for the teacher"
        for i in ids[:EXAMPLES]
    ]
    return [f"{len(ids)} {what}: {', '.join(examples)}{', ...' if len(ids) > EXAMPLES else ''}"]


def _meaning(token: str | None) -> str:
    return "unknown" if token is None else repr(token)


def _probed(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, ids: list[int]) -> list[str]:
    """Return how the two split text differently: the probe, and what a sample of the ids spells; they agree on ids."""
    probe = PROBE + str(student.decode(ids[:: max(1, len(ids) // SAMPLE)]))
    ours, theirs = student.tokenize(probe), teacher.tokenize(probe)
    if ours == theirs:
        return []
    at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    return [
        "the vocabularies are equal, but text is split differently (other merges, normalisation or pre-tokenisation): "
        f"{ours[at : at + 4]} for the student, {theirs[at : at + 4]} for the teacher"
    ]


def _differences(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> Iterator[str]:
    for role in ("eos_token", "bos_token"):
        ours, theirs = getattr(student, role), getattr(teacher, role)
        if ours != theirs:
            yield f"{role} is {_meaning(ours)} for the student, {_meaning(theirs)} for the teacher"
    if student.chat_template != teacher.chat_template:
        ours, theirs = ("a" if one.chat_template else "no" for one in (student, teacher))
        how = "the two are not the same" if ours == theirs else "only one can be asked in chat form"
        yield f"the student has {ours} chat template, the teacher has {theirs} chat template: {how}"


def _too_few_rows(who: str, tokens: dict[int, str], rows: int) -> Iterator[str]:
    beyond = sorted(i for i in tokens if i >= rows)
    if beyond:
        yield (
            f"the {who}'s head has {rows} rows, but its tokenizer knows {len(beyond)} tokens from id {beyond[0]} "
            f"({tokens[beyond[0]]!r}) on: resize its embeddings before using them"
        )
