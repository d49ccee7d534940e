"""Bytes that a rank sends in an optimiser step, by what for.

Counted as a ring sends them, and as it is least: of n ranks, a sum that all get (all-reduce) sends 2 (n - 1) / n times
its bytes from each, a sum of which each gets its share (reduce-scatter), or shares that are put together (all-gather),
(n - 1) / n times the whole's. Counts, norms and paddings are left out.
"""

import math
from collections.abc import Mapping

from kdlm.plan.prediction import Prediction
from kdlm.plan.ranks import Share
from kdlm.plan.strategies import Strategy


def sent(found: Prediction, ranks: int, strategy: Strategy, *, sharded_teacher: bool = False) -> Mapping[str, float]:
    """Return the bytes that each of `ranks` sends to others: of gradients, weights, the teacher and its head.

    Args:
        found: what one process of them does.
        sharded_teacher: whether `teacher.placement` is sharded.
    """
    if ranks == 1:
        return {}
    share, of_all = Share(found, ranks, strategy, sharded_teacher), (ranks - 1) / ranks
    student, steps = share.student, found.settings.accumulation
    if strategy.name == "ddp":
        amounts = {"gradients": 2 * student.trained * student.item}
    else:
        each = steps if strategy.name in ("zero2", "zero3") else 1  # DeepSpeed sums shares in every micro-batch
        each *= 1 if strategy.weights else 2  # ZeRO-1 and 2 sum for all ranks (use_multi_rank_bucket_allreduce)
        amounts = {"gradients": each * student.trained * share.compute}
        updated = student.trained  # given round after the step
        again = student.everything if strategy.zero else student.layers  # FSDP2 keeps the rest from forward to backward
        read = steps * (student.everything + again)
        amounts["weights"] = (read if strategy.weights else updated) * share.compute
    if sharded_teacher and (teacher := found.traced.teacher) is not None:
        head = teacher.head * teacher.item
        amounts["teacher"] = answers(found) * (teacher.bytes - head)
        amounts["teacher's head"] = answers(found) * head
    return {name: of_all * amount for name, amount in amounts.items()}


def answers(found: Prediction) -> int:
    """Return how often a teacher reads in an optimiser step."""
    settings, size = found.settings, found.traced.reads
    return settings.accumulation if size is None else math.ceil(settings.accumulation * settings.batch / size)


def brought(found: Prediction) -> float:
    """Return the bytes that come to a rank in an optimiser step from elsewhere: the host's memory, a server, disk."""
    return found.traced.host + found.traced.signal * found.settings.accumulation
