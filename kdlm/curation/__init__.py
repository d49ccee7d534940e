"""Curation: from prompts and completions to the rows that a student is trained on."""

from kdlm.curation.columns import Columns
from kdlm.curation.corrupt import Corrupt, TagForm
from kdlm.curation.cut import Cut
from kdlm.curation.decontaminate import Decontaminate
from kdlm.curation.deduplicate import Deduplicate
from kdlm.curation.divergence import Divergence
from kdlm.curation.entity_questions import EntityQuestions
from kdlm.curation.expectation import Expectation
from kdlm.curation.extract import Extract
from kdlm.curation.fall_back import FallBack
from kdlm.curation.filter import Condition, Filter
from kdlm.curation.generate import Generate
from kdlm.curation.influence import Influence
from kdlm.curation.language import Language
from kdlm.curation.paced import Paced
from kdlm.curation.pairs import Pairs
from kdlm.curation.pipeline import AnyStep, Pipeline, check, run
from kdlm.curation.preferring import OfModels, Ranked, Right
from kdlm.curation.recombine import Recombine
from kdlm.curation.score import Score
from kdlm.curation.screen import Screen
from kdlm.curation.select import Select
from kdlm.curation.step import Counts, Desk, Step
from kdlm.curation.tasks import Tasks
from kdlm.curation.thoughts import Thoughts
from kdlm.curation.tokens import Tokens
from kdlm.curation.verify import Verify
from kdlm.curation.vote import Vote
from kdlm.curation.write import Write

__all__ = [
    "AnyStep",
    "Columns",
    "Condition",
    "Corrupt",
    "Counts",
    "Cut",
    "Decontaminate",
    "Deduplicate",
    "Desk",
    "Divergence",
    "EntityQuestions",
    "Expectation",
    "Extract",
    "FallBack",
    "Filter",
    "Generate",
    "Influence",
    "Language",
    "OfModels",
    "Paced",
    "Pairs",
    "Pipeline",
    "Ranked",
    "Recombine",
    "Right",
    "Score",
    "Screen",
    "Select",
    "Step",
    "TagForm",
    "Tasks",
    "Thoughts",
    "Tokens",
    "Verify",
    "Vote",
    "Write",
    "check",
    "run",
]
