"""Where a teacher's weights are: on which device, and where they rest while others need its memory."""

import os
from collections.abc import Iterable

import torch
from torch import Tensor, nn


def own_device(device: str) -> str:
    """Return where this rank's teacher lives: of `next`, the GPU of its number behind those of the students.

    Rank r of n on this machine takes `cuda:(n + r)`. Raises ValueError where there are not so many GPUs, and where one
    device would hold the teachers of several ranks.
    """
    ranks, rank = (int(os.environ.get(name, least)) for name, least in (("LOCAL_WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    if device == "next":
        if torch.cuda.device_count() < 2 * ranks:
            raise ValueError(
                f"teacher.device: next gives each of {ranks} ranks a second GPU, and there are "
                f"{torch.cuda.device_count()} on this machine: start {max(1, torch.cuda.device_count() // 2)}, or use "
                "placement: sliced"
            )
        return f"cuda:{ranks + rank}"
    if ranks > 1 and device.startswith("cuda"):
        raise ValueError(
            f"teacher.device: {device} would hold the teachers of all {ranks} ranks of this machine: use next, which "
            f"gives rank r the GPU {ranks} + r, or leave device out"
        )
    return device


class Shelf:
    """The weights of a frozen model, which rest in the host's memory while their device is needed for others.

    They are never changed, so that to put them back is to let the device's copy go. On a CPU nothing moves.

    Args:
        model: with its weights in the host's memory.
        device: where they are used.
        stay: parameters that are on the device all the time, as buffers are.
    """

    def __init__(self, model: nn.Module, device: torch.device, stay: Iterable[Tensor | None] = ()):
        self.device = device
        kept = {id(one) for one in stay}
        self._resting: list[tuple[nn.Parameter, Tensor]] = []
        for parameter in model.parameters():
            if id(parameter) in kept:
                parameter.data = parameter.data.to(device)
            else:
                self._resting.append((parameter, self._rest(parameter)))
        for buffer in model.buffers():
            buffer.data = buffer.data.to(device)
        self.put_back()

    @property
    def bytes(self) -> int:
        """What moves in a turn."""
        return sum(weight.nbytes for _, weight in self._resting)

    def fetch(self) -> None:
        """Bring the weights to the device."""
        for parameter, weight in self._resting:
            parameter.data = weight.to(self.device, non_blocking=True)

    def put_back(self) -> None:
        """Let the device's memory go."""
        for parameter, weight in self._resting:
            parameter.data = weight

    def _rest(self, parameter: nn.Parameter) -> Tensor:
        weight = parameter.data.cpu()
        return weight.pin_memory() if self.device.type == "cuda" else weight
