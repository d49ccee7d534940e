"""Small networks in several roles, and a method whose roles take turns."""

from typing import Any

import torch
from torch import Tensor, nn

from kdlm.data import TensorRows
from kdlm.methods import EmaOf, Method, SnapshotOf, Step, Term, Terms, Trainable
from kdlm.methods.method import Nets


class Tied(nn.Module):
    """Two layers that share one matrix, with a buffer beside it."""

    def __init__(self, width: int = 4):
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)
        self.second.weight = self.first.weight
        self.register_buffer("scale", torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x))) * self.scale


class Turns(Method):
    """The critic moves at every step but the first of three, the student at the first of three.

    `seen` counts the student's steps in float64: the method's own state.
    """

    needs = frozenset({"samples"})
    computes = ("student", "critic")
    paced_by = "samples"
    ema = 0.7
    roles = {
        "student": Trainable(),
        "critic": Trainable(make=lambda student, teacher: tied(7), learning_rate=0.02),
        "average": EmaOf("student", decay=ema),
        "before": SnapshotOf("student"),
    }

    def __init__(self) -> None:
        self.seen = torch.zeros((), dtype=torch.float64)

    def active(self, step: int) -> frozenset[str]:
        return frozenset({"critic"} if step % 3 else {"student"})

    def counts(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"samples": torch.tensor(len(batch["index"]))}

    def losses(self, nets: Nets, batch: dict[str, Tensor], active: frozenset[str], step: Step) -> Terms:
        made = nets["student"](batch["samples"])
        terms = {}
        if "student" in active:
            before = nets["before"](batch["samples"].float())  # averages and snapshots are kept in float32
            wanted = nets["critic"](made) + batch["samples"].flip(1) + 0.3 * before
            terms["student"] = Term((made - wanted).square().mean(1).sum(), "samples")
        if "critic" in active:
            terms["critic"] = Term((nets["critic"](made.detach()) + 1).square().mean(1).sum(), "samples")
        return Terms(terms)

    def evaluate(self, nets: Nets, batch: dict[str, Tensor], step: Step) -> Terms:
        return self.losses(nets, batch, frozenset({"student", "critic"}), step)

    def stepped(self, step: Step, means: dict[str, Tensor]) -> None:
        self.seen += 1

    def state_dict(self) -> dict[str, Tensor]:
        return {"seen": self.seen}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.seen = state["seen"]


def tied(seed: int) -> Tied:
    """Two tied layers in float64."""
    torch.manual_seed(seed)
    return Tied().double()


def samples(count: int = 8, width: int = 4) -> TensorRows:
    """Rows with `samples` in float64 and `index`."""
    generator = torch.Generator().manual_seed(2)
    made = torch.randn(count, width, generator=generator, dtype=torch.float64)
    return TensorRows({"samples": made, "index": torch.arange(count)})


def weights(module: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters."""
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def adam_steps(trainer: Any) -> dict[str, set[int]]:
    """Adam's own step counters of each role's parameters."""
    found: dict[str, set[int]] = {}
    for group in trainer.optimizer.param_groups:
        states = [trainer.optimizer.state[p] for p in group["params"] if p in trainer.optimizer.state]
        found.setdefault(group["role"], set()).update(int(state["step"]) for state in states)
    return found
