"""Evaluation while a student trains: which rows, what is read on them beside the loss, and which checkpoint is best."""

from kdlm.evaluation.section import EvaluationSection, Generations

__all__ = ["EvaluationSection", "Generations"]
