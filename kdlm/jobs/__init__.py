"""Evaluation jobs: student, teacher and baselines on the same tasks, through lm-evaluation-harness."""

from kdlm.jobs.job import Job, TaskSettings
from kdlm.jobs.models import AnyEvaluated

__all__ = ["AnyEvaluated", "Job", "TaskSettings"]
