"""Curation: from prompts and completions to the rows that a student is trained on."""

from kdlm.curation.filter import Condition, Filter
from kdlm.curation.generate import Generate
from kdlm.curation.pipeline import AnyStep, Pipeline, run
from kdlm.curation.step import Counts, Desk, Step
from kdlm.curation.verify import Verify

__all__ = ["AnyStep", "Condition", "Counts", "Desk", "Filter", "Generate", "Pipeline", "Step", "Verify", "run"]
