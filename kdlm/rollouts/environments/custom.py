"""The way in for an environment of your own."""

from typing import Literal

from kdlm.rollouts.environment import Environment, EnvironmentSection, Judging
from kdlm.rollouts.rows import Row
from kdlm.section import Custom


class CustomEnvironment(Custom, EnvironmentSection):
    """Your own class or function `(row, **args) -> environment`: whatever has `step(text) -> Reply`.

    `row["reference"]` is what `column` holds. A verifier of the recipe judges the last turn beside it.
    """

    name: Literal["custom"] = "custom"
    column: str | None = None
    """The column of the data that episodes are made from."""

    def reference(self) -> str | None:
        return self.column

    def start(self, row: Row, judge: Judging | None) -> Environment:
        made = self.load()(row, **self.args)
        if not isinstance(made, Environment):
            raise ValueError(
                f"rollouts.environment: {self.target} made a {type(made).__name__}, which has no step(text) -> Reply"
            )
        return made
