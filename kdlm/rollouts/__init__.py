"""Rollouts: prompts -> completions of the student, with the log-probabilities that its engine gave them."""

from kdlm.rollouts.bands import PassRate
from kdlm.rollouts.engine import Completion, Engine, Sampling, end_ids
from kdlm.rollouts.environment import Environment, EnvironmentSection, Judging, Reply
from kdlm.rollouts.environments import AnyEnvironment
from kdlm.rollouts.episodes import Episodes
from kdlm.rollouts.generate import GenerateEngine, GenerateSection, context_of
from kdlm.rollouts.rounds import Repeated, Rounds, Slot
from kdlm.rollouts.rows import SAID, Opaque, Row, Written, as_row, describe, prompt_of
from kdlm.rollouts.sections import AnyEngine, RolloutSection, check_engine
from kdlm.rollouts.unmask import UnmaskEngine, UnmaskSection

__all__ = [
    "SAID",
    "AnyEngine",
    "AnyEnvironment",
    "Completion",
    "Engine",
    "Environment",
    "EnvironmentSection",
    "Episodes",
    "GenerateEngine",
    "GenerateSection",
    "Judging",
    "Opaque",
    "PassRate",
    "Repeated",
    "Reply",
    "RolloutSection",
    "Rounds",
    "Row",
    "Sampling",
    "Slot",
    "UnmaskEngine",
    "UnmaskSection",
    "Written",
    "as_row",
    "check_engine",
    "context_of",
    "describe",
    "end_ids",
    "prompt_of",
]
