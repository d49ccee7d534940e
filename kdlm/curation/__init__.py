"""Curation: from prompts and completions to the rows that a student is trained on."""

from kdlm.curation.corrupt import Corrupt, TagForm
from kdlm.curation.cut import Cut
from kdlm.curation.divergence import Divergence
from kdlm.curation.entity_questions import EntityQuestions
from kdlm.curation.fall_back import FallBack
from kdlm.curation.filter import Condition, Filter
from kdlm.curation.generate import Generate
from kdlm.curation.pairs import Pairs
from kdlm.curation.pipeline import AnyStep, Pipeline, check, run
from kdlm.curation.preferring import OfModels, Ranked, Right
from kdlm.curation.score import Score
from kdlm.curation.step import Counts, Desk, Step
from kdlm.curation.tasks import Tasks
from kdlm.curation.thoughts import Thoughts
from kdlm.curation.verify import Verify

__all__ = [
    "AnyStep",
    "Condition",
    "Corrupt",
    "Counts",
    "Cut",
    "Desk",
    "Divergence",
    "EntityQuestions",
    "FallBack",
    "Filter",
    "Generate",
    "OfModels",
    "Pairs",
    "Pipeline",
    "Ranked",
    "Right",
    "Score",
    "Step",
    "TagForm",
    "Tasks",
    "Thoughts",
    "Verify",
    "check",
    "run",
]
