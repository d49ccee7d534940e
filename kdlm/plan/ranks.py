"""What one of several ranks holds: the parts of a plan for one process, those that are shared out divided.

The moments of the one process's step are gone through again: at each, parts that ranks share out are a rank's share,
and what it gathers of the others comes on top. So the peak may be at another moment than without sharing.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from kdlm.plan.prediction import PARTS, Prediction, largest, on_gpu
from kdlm.plan.sizes import Weights
from kdlm.plan.strategies import Strategy

BUCKET = 500_000_000
"""Elements of the buffer in which ZeRO-1 and 2 sum gradients, and of what ZeRO-3 keeps gathered at most, halved:
DeepSpeed's own defaults."""
AHEAD = 2
"""Layers that are whole at once in a backward pass: the one that computes, and the one that is fetched meanwhile."""
FORWARD = 3
"""And in a forward pass, where one layer gives way to the next: the flat buffer in which the one before came (FSDP2
frees it when the next one is copied out: `FSDPParamGroup.wait_for_unshard`), the next one's, and its weights."""
READS = ("student forward", "loss", "backward", "teacher forward", "evaluation")
"""Phases in which what lies outside the layers is gathered; the teacher's turn may come after the student's."""


def per_rank(found: Prediction, ranks: int, strategy: Strategy, *, sharded_teacher: bool = False) -> Prediction:
    """Return what each of `ranks` will take; the plan itself for one.

    Args:
        found: what one process takes, with its teacher resident.
        sharded_teacher: whether `teacher.placement` is sharded.
    """
    if ranks == 1:
        return found
    share = Share(found, ranks, strategy, sharded_teacher)
    phases = {}
    for name, phase in found.traced.phases.items():
        seen = list(phase.moments.values()) or [phase.parts]
        moments = [share.of(moment, name) for moment in seen]
        if name == "backward":
            moments.append(share.at_the_end(seen[-1]))
        phases[name] = max(moments, key=lambda parts: sum(parts.values()))
    peak = largest(phases)
    framework = found.parts["framework"] if found.device.kind == "cpu" else on_gpu(phases[peak])
    parts = {**phases[peak], "framework": framework}
    return replace(found, phases=phases, peak=peak, parts=parts, tokens=found.tokens * ranks)


@dataclass(frozen=True)
class Share:
    """What a rank's share of a moment's parts is."""

    found: Prediction
    ranks: int
    strategy: Strategy
    sharded_teacher: bool

    @property
    def student(self) -> Weights:
        return self.found.traced.student

    @property
    def compute(self) -> float:
        """Bytes of a student's weight as it computes, is gathered, and as its gradient is summed in shards."""
        half = self.found.settings.autocast
        return self.student.item if half is None else half.itemsize

    def of(self, moment: Mapping[str, int], phase: str) -> dict[str, int]:
        """Return the bytes by part that a rank holds when one process holds those of `moment`."""
        held = {part: float(moment.get(part, 0)) for part in PARTS}
        self._divide(held)
        made = moment.get("gradients", 0) / self.student.item * self.compute
        held["gathered"] += self._gathered(phase, made)
        if self.strategy.name == "ddp":
            held["communication"] += self.student.trained * self.student.item
        if self.strategy.name in ("zero1", "zero2"):
            held["communication"] += BUCKET * self.compute
        if self.sharded_teacher:
            self._divide_teacher(held, phase, made)
        return {part: int(size) for part, size in held.items()}

    def at_the_end(self, moment: Mapping[str, int]) -> dict[str, int]:
        """Return what is held when the last gradients of a backward pass, those outside the layers, are summed."""
        held = self.of(moment, "backward")
        if self.strategy.name == "fsdp2":
            rest, trained = self.student.rest * self.compute, self._trained
            layer = self.student.largest * self.compute  # of the last layer, in the order of ranks
            copies = 3 if self._gloo else 2  # the gradients, they in the order of ranks, and gloo's own
            held["gathered"] = int(max(rest + (rest + layer) * trained, copies * rest * trained))
        return held

    def _divide(self, held: dict[str, float]) -> None:
        strategy, student, ranks = self.strategy, self.student, self.ranks
        trained = student.trained * student.item
        ratio = self.compute / student.item
        if strategy.zero:
            master = trained / ranks  # single precision, beside the weights that compute
            held["weights"] += (ratio - 1) * student.bytes
            held["gradients"] *= ratio
            held["optimiser"] = held["optimiser"] / ranks + master
            held["copies"] = 0
        if strategy.name == "fsdp2":
            held["optimiser"] /= ranks
            if self.found.settings.autocast is not None:
                held["copies"] = 0  # gathered as they compute
            held["gradients"] *= ratio if self._kept_whole else 1 / ranks
        elif strategy.gradients:
            held["gradients"] /= ranks
        if strategy.weights:
            whole = student.bytes * (ratio if strategy.zero else 1)
            held["weights"] -= whole * (1 - 1 / ranks)

    @property
    def _kept_whole(self) -> bool:
        """Whether gradients stay whole until the last micro-batch, which alone sums them over the ranks."""
        return self.found.settings.accumulation > 1

    @property
    def _trained(self) -> float:
        return self.student.trained / self.student.everything

    @property
    def _gloo(self) -> bool:
        """Whether gloo sends, which makes a copy of what an all-gather gives and a reduce-scatter takes; NCCL none."""
        return self.found.device.kind == "cpu"

    def _gathered(self, phase: str, made: float) -> float:
        """Return the bytes of the student's weights, and of gradients, that others own and this rank holds a while.

        Args:
            made: bytes of gradients that one process has made by then.
        """
        if not self.strategy.weights:
            return 0.0
        student, item = self.student, self.compute
        if phase == "rollouts":
            return student.everything * item
        if phase not in READS:
            return 0.0
        if self.strategy.zero:
            layers = 0 if phase in ("loss", "teacher forward") else AHEAD * student.largest
            found = (student.rest + max(layers, min(2 * BUCKET, student.layers))) * item
            grads = (student.head + AHEAD * student.largest) * self._trained * item
            return found + (grads if phase == "backward" else 0)
        # in a loss: the last layer's buffer, which goes when the outermost group's forward pass, loss and all, ends
        layers = {"teacher forward": 0, "loss": 1, "backward": AHEAD}.get(phase, FORWARD)
        found = (student.rest + layers * student.largest) * item
        return found + (self._on_their_way(made) if phase == "backward" else 0)

    def _on_their_way(self, made: float) -> float:
        """Return the bytes of whole gradients that FSDP2 holds in a backward pass, and of copies to sum them.

        Those of a layer are whole until it is done, then copied in the order of ranks: the copy stays until the next
        layer is done (`FSDPCommContext.reduce_scatter_states`). Those outside the layers are summed last. Gradients
        that are kept whole all the same only come with the copy.
        """
        layer = self.student.largest * self.compute
        grads = layer * self._trained
        sending = layer if self._gloo else 0  # a layer is fetched before the one that computes has made its gradients
        if self._kept_whole:
            return max(sending, grads)
        head = min(made, self.student.head * self.compute * self._trained)
        return head + max(sending + min(made - head, grads), min(made - head, 2 * grads))

    def _divide_teacher(self, held: dict[str, float], phase: str, made: float) -> None:
        teacher: Any = self.found.traced.teacher
        held["teacher weights"] -= teacher.bytes * (1 - 1 / self.ranks)
        head, item = teacher.head * teacher.item, teacher.item
        if phase == "loss":
            held["gathered"] += head
        elif phase == "backward" and not made:  # a loss may read it once more, before any layer is gathered
            rest = self.student.rest * self.compute if self.strategy.weights else 0
            held["gathered"] = rest + max(held["gathered"] - rest, head)
        elif phase in ("teacher forward", "teacher's turn", "evaluation"):
            held["gathered"] += max((teacher.rest - teacher.head + FORWARD * teacher.largest) * item, head)
