"""Runs of several stages: one file, each stage a run of its own that takes what earlier ones left."""

from kdlm.stages.looks import check
from kdlm.stages.planning import plan
from kdlm.stages.reading import StagedRun, load
from kdlm.stages.running import train
from kdlm.stages.sections import Stage, Stages

__all__ = ["Stage", "StagedRun", "Stages", "check", "load", "plan", "train"]
