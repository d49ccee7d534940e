"""Curation: from prompts and completions to the rows that a student is trained on."""

from kdlm.curation.columns import Columns
from kdlm.curation.decontaminate import Decontaminate
from kdlm.curation.deduplicate import Deduplicate
from kdlm.curation.extract import Extract
from kdlm.curation.filter import Condition, Filter
from kdlm.curation.generate import Generate
from kdlm.curation.language import Language
from kdlm.curation.pipeline import AnyStep, Pipeline, run
from kdlm.curation.select import Select
from kdlm.curation.step import Counts, Desk, Step
from kdlm.curation.tokens import Tokens
from kdlm.curation.verify import Verify
from kdlm.curation.write import Write

__all__ = [
    "AnyStep",
    "Columns",
    "Condition",
    "Counts",
    "Decontaminate",
    "Deduplicate",
    "Desk",
    "Extract",
    "Filter",
    "Generate",
    "Language",
    "Pipeline",
    "Select",
    "Step",
    "Tokens",
    "Verify",
    "Write",
    "run",
]
