"""Verifiers: completion and reference -> a verdict."""

from typing import Annotated

from pydantic import Field

from kdlm.verifiers.answer import Answer
from kdlm.verifiers.code import Code
from kdlm.verifiers.custom import CustomVerifier
from kdlm.verifiers.exact import Exact
from kdlm.verifiers.json_schema import JSONSchema
from kdlm.verifiers.judge import Judge
from kdlm.verifiers.mathematics import Math
from kdlm.verifiers.numeric import Numeric
from kdlm.verifiers.regex import Regex
from kdlm.verifiers.verifier import Verdict, Verifier, VerifierSection
from kdlm.verifiers.walk import Walk

AnyVerifier = Annotated[
    Exact | Numeric | Answer | Math | Regex | JSONSchema | Code | Walk | CustomVerifier, Field(discriminator="name")
]
"""A verifier of a recipe, chosen by its `name`."""

__all__ = [
    "Answer",
    "AnyVerifier",
    "Code",
    "CustomVerifier",
    "Exact",
    "JSONSchema",
    "Judge",
    "Math",
    "Numeric",
    "Regex",
    "Verdict",
    "Verifier",
    "VerifierSection",
    "Walk",
]
