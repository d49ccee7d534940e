"""Environments: what answers the student between its turns."""

from typing import Annotated

from pydantic import Field

from kdlm.rollouts.environments.custom import CustomEnvironment
from kdlm.rollouts.environments.retry import RetrySection
from kdlm.rollouts.environments.tools import ToolsSection

AnyEnvironment = Annotated[RetrySection | ToolsSection | CustomEnvironment, Field(discriminator="name")]
"""An environment of a recipe, chosen by its `name`."""

__all__ = ["AnyEnvironment", "CustomEnvironment", "RetrySection", "ToolsSection"]
