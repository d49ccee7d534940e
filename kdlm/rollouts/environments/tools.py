"""The environment `tools`: a calculator and a key-value store of the sandbox."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from pydantic import Field

from kdlm.rollouts.environment import EnvironmentSection, Judging, Reply
from kdlm.rollouts.rows import Row
from kdlm.sandbox.tool_tasks import world_of
from kdlm.sandbox.tools import World


class ToolsSection(EnvironmentSection):
    """Each turn is one call, the last one the answer; the reward is 1 where answer and store are right, else 0."""

    role: ClassVar[Literal["user", "tool"]] = "tool"

    name: Literal["tools"] = "tools"
    turns: int = Field(8, ge=1)
    """The most calls, the answer among them."""
    column: str = "task"
    """The column of the data that holds the task, as `sandbox:tools` writes it."""

    def reference(self) -> str | None:
        return self.column

    def start(self, row: Row, judge: Judging | None) -> "Tools":
        if row.get("reference") is None:
            raise ValueError(f"rollouts.environment: a row has no task: map its column {self.column!r} to `reference`")
        return Tools(world_of(row["reference"]))


@dataclass(frozen=True)
class Tools:
    """One task and its tools."""

    world: World

    def step(self, text: str) -> Reply:
        said = self.world.call(text)
        return Reply(said.text, float(said.right), said.done, said.text)
