"""Jail: Python code that nobody has read, run in a process that can harm little and ends in time."""

from kdlm.jail.limits import Isolation, Limits, Run, Test
from kdlm.jail.running import run
from kdlm.jail.support import missing

__all__ = ["Isolation", "Limits", "Run", "Test", "missing", "run"]
