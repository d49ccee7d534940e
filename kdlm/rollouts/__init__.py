"""Rollouts: prompts -> completions of the student, with the log-probabilities that its engine gave them."""

from kdlm.rollouts.engine import Completion, Engine, Sampling

__all__ = ["Completion", "Engine", "Sampling"]
