"""Heads that tensor parallelism has sliced by token ids: what the kernels get of each side, and who merges."""

from dataclasses import replace
from typing import Any

from torch.distributed import ProcessGroup, get_rank, get_world_size

from kdlm.signal import Dense, Hidden, Mixture, Signal


def sliced(student: Hidden | Dense, teacher: Signal | None) -> tuple[Any, Any, ProcessGroup | None]:
    """Return both sides as this rank's slice of the ids, and the group whose ranks hold the other slices.

    The student's head says where the slices begin. A teacher that is whole here is cut there, a view; one that is known
    by some of its tokens stays as it is. Where the student is whole, so becomes the teacher, and there is no group.
    """
    group = student.head.group if isinstance(student, Hidden) else None
    if group is None:
        return student, whole(teacher), None
    assert isinstance(student, Hidden)
    ours = replace(student, head=student.head.slice())
    if not isinstance(teacher, Hidden | Dense):
        return ours, teacher, group
    if isinstance(teacher, Hidden) and teacher.head.group is not None:
        return ours, replace(teacher, head=teacher.head.slice()), group
    rank, last = get_rank(group), get_world_size(group) - 1
    longest = -(-student.vocab_size // (last + 1))  # as torch cuts
    at = slice(rank * longest, None if rank == last else (rank + 1) * longest)
    if isinstance(teacher, Dense):
        return ours, Dense(teacher.logits[:, at]), group
    head = teacher.head
    few = replace(head, weight=head.weight[at], bias=None if head.bias is None else head.bias[at])
    return ours, replace(teacher, head=few), group


def whole(signal: Any) -> Any:
    """Return a signal whose heads have all ids on this rank, for what runs without a kernel; all ranks must ask."""
    if isinstance(signal, Mixture):
        return replace(signal, members=tuple(whole(member) for member in signal.members))
    return replace(signal, head=signal.head.whole()) if isinstance(signal, Hidden) else signal
