"""All steps of a pipeline."""

from typing import Annotated

from pydantic import Field

from kdlm.curation.columns import Columns
from kdlm.curation.corrupt import Corrupt
from kdlm.curation.cut import Cut
from kdlm.curation.decontaminate import Decontaminate
from kdlm.curation.deduplicate import Deduplicate
from kdlm.curation.divergence import Divergence
from kdlm.curation.entity_questions import EntityQuestions
from kdlm.curation.expectation import Expectation
from kdlm.curation.extract import Extract
from kdlm.curation.fall_back import FallBack
from kdlm.curation.filter import Filter
from kdlm.curation.generate import Generate
from kdlm.curation.influence import Influence
from kdlm.curation.language import Language
from kdlm.curation.paced import Paced
from kdlm.curation.pairs import Pairs
from kdlm.curation.recombine import Recombine
from kdlm.curation.score import Score
from kdlm.curation.screen import Screen
from kdlm.curation.select import Select
from kdlm.curation.tasks import Tasks
from kdlm.curation.thoughts import Thoughts
from kdlm.curation.tokens import Tokens
from kdlm.curation.verify import Verify
from kdlm.curation.vote import Vote
from kdlm.curation.write import Write

AnyStep = Annotated[
    Generate
    | Verify
    | Filter
    | Select
    | Decontaminate
    | Deduplicate
    | Language
    | Screen
    | Tokens
    | Write
    | Extract
    | Columns
    | Score
    | Divergence
    | Cut
    | Vote
    | Expectation
    | Recombine
    | Paced
    | Influence
    | Pairs
    | Corrupt
    | FallBack
    | Tasks
    | Thoughts
    | EntityQuestions,
    Field(discriminator="name"),
]
"""A step of a pipeline, chosen by its `name`."""
