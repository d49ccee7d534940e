"""Rollouts: prompts -> completions of the student, with the log-probabilities that its engine gave them."""

from kdlm.rollouts.engine import Completion, Engine, Sampling
from kdlm.rollouts.generate import GenerateEngine, GenerateSection
from kdlm.rollouts.rounds import Repeated, Rounds, Slot
from kdlm.rollouts.rows import Opaque, Row, Written, as_row, describe, prompt_of
from kdlm.rollouts.sections import AnyEngine, RolloutSection, check_engine
from kdlm.rollouts.unmask import UnmaskEngine, UnmaskSection

__all__ = [
    "AnyEngine",
    "Completion",
    "Engine",
    "GenerateEngine",
    "GenerateSection",
    "Opaque",
    "Repeated",
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
    "describe",
    "prompt_of",
]
