"""Many GPUs: how fast they hand each other bytes, and the pace that a run has on them."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from kdlm.plan.communication import brought, sent
from kdlm.plan.devices import HOST_LINK
from kdlm.plan.prediction import Prediction, on_gpu
from kdlm.plan.ranks import per_rank
from kdlm.plan.strategies import Strategy

OF_LINK = 0.7
"""Share of a link's rate that collectives reach. Assumed, not measured."""
LINKS = {
    "NVLink": 450e9,
    "InfiniBand": 50e9,
    "host": HOST_LINK,
    "network": 3e9,
    "disk": 2e9,
}
"""Bytes/s that a GPU sends and gets at once: NVLink of the fourth generation (H100: 900 GB/s in both directions
together), InfiniBand NDR (400 Gb/s for each GPU), pinned memory of the host, a GPU's part of 200 Gb/s to a served
teacher, a GPU's part of local disks. The makers' or assumed, not measured."""
COMES_BY = {"sliced": "host", "next GPU": "NVLink", "served": "network", "cached": "disk"}
"""What a placement of the teacher brings its signals, or its weights, by."""


@dataclass(frozen=True)
class Cluster:
    """So many GPUs, so many of them on a machine."""

    gpus: int
    per_node: int = 8

    def __post_init__(self) -> None:
        if self.gpus < 1 or self.per_node < 1:
            raise ValueError(f"--gpus {self.gpus}, --per-node {self.per_node}: expected at least one")
        if self.gpus % min(self.gpus, self.per_node):
            raise ValueError(
                f"--gpus {self.gpus}: expected a multiple of the {self.per_node} of a machine (--per-node)"
            )

    @property
    def nodes(self) -> int:
        return -(-self.gpus // self.per_node)

    @property
    def link(self) -> str:
        """The slowest link of a ring through all GPUs."""
        return "NVLink" if self.nodes == 1 else "InfiniBand"


@dataclass(frozen=True)
class Spread:
    """A recipe on a cluster.

    Attributes:
        alone: what is foreseen of one process, with a sharded teacher resident.
        placement: of the teacher, as the table names it; None without one.
        teacher: bytes of a teacher that has the next GPU for itself.
        waits: seconds of an optimiser step in which it computes there.
    """

    alone: Prediction
    cluster: Cluster
    strategy: Strategy
    placement: str | None
    teacher: int = 0
    waits: float = 0.0

    @property
    def ranks(self) -> int:
        """GPUs that train: half of them where each has a second one for the teacher."""
        return self.cluster.gpus // (2 if self.placement == "next GPU" else 1)

    @cached_property
    def rank(self) -> Prediction:
        """What each GPU will take."""
        sharded = self.placement == "sharded"
        return per_rank(self.alone, self.ranks, self.strategy, sharded_teacher=sharded)

    @property
    def fits(self) -> bool:
        beside = self.teacher + on_gpu({"teacher": self.teacher}) if self.teacher else 0
        return self.rank.fits and beside <= self.alone.device.memory

    @cached_property
    def sent(self) -> Mapping[str, float]:
        """Bytes that a GPU sends others in an optimiser step, by what for."""
        sharded = self.placement == "sharded"
        return sent(self.alone, self.ranks, self.strategy, sharded_teacher=sharded)

    @property
    def brought(self) -> float:
        """Bytes that come to a GPU in an optimiser step from the host's memory, another GPU, a server or disk."""
        return brought(self.alone)

    @property
    def bytes_per_token(self) -> float:
        """Bytes that a GPU sends and is brought for each token that it trains on."""
        return (sum(self.sent.values()) + self.brought) / self.alone.tokens

    @property
    def talking(self) -> float:
        """Seconds of an optimiser step that links are busy for, one after the other."""
        seconds = sum(self.sent.values()) / (LINKS[self.cluster.link] * OF_LINK)
        if self.placement in COMES_BY and self.placement != "sliced":  # whose moves the plan of one process has
            seconds += self.brought / (LINKS[COMES_BY[self.placement]] * OF_LINK)
        return seconds

    @property
    def step_seconds(self) -> tuple[float, float] | None:
        """Seconds of an optimiser step if all talking is beside computing, and if none is."""
        if self.alone.step_seconds is None:
            return None
        computing = self.alone.step_seconds + self.waits
        return max(computing, self.talking), computing + self.talking

    @property
    def tokens_per_second(self) -> tuple[float, float] | None:
        """Tokens/s of all GPUs at worst and at best."""
        seconds = self.step_seconds
        return None if seconds is None else (self.rank.tokens / seconds[1], self.rank.tokens / seconds[0])

    def utilisation(self, *, teacher: bool) -> tuple[float, float] | None:
        """Return model FLOPs over what the GPU could do in the same time, at worst and at best; None: not known.

        Of the student's forward and backward pass, without what is computed twice; with the teacher's forward pass
        beside them or without.
        """
        device, settings = self.alone.device, self.alone.settings
        peak = device.single if settings.autocast is None else device.half
        if self.step_seconds is None or peak is None:
            return None
        flops = self.alone.student_flops + (self.alone.teacher_flops if teacher else 0)
        return flops / (peak * self.step_seconds[1]), flops / (peak * self.step_seconds[0])

    def as_dict(self) -> dict[str, Any]:
        """Return the figures: bytes and seconds of a GPU in an optimiser step."""
        return {
            "strategy": self.strategy.name,
            "placement": self.placement,
            "memory": {"total": self.rank.total, "fits": self.fits, "parts": dict(self.rank.parts)},
            "sent": dict(self.sent),
            "brought": self.brought,
            "bytes_per_token": self.bytes_per_token,
            "tokens_per_second": self.tokens_per_second,
            "utilisation": self.utilisation(teacher=False),
            "utilisation_with_teacher": self.utilisation(teacher=True),
        }
