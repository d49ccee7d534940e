"""The rule of the sandbox's tasks."""

from collections.abc import Mapping
from typing import Any, Literal

from kdlm.sandbox.tasks import gives
from kdlm.verifiers.verifier import Verifier, VerifierSection


class Answer(VerifierSection):
    """The final answer of the completion is the reference: integers by value, other text letter by letter."""

    name: Literal["answer"] = "answer"

    def verifier(self) -> Verifier:
        return self._judge

    def _judge(self, completion: str, reference: Any, row: Mapping[str, Any]) -> bool:
        if reference is None:
            raise ValueError(f"no reference, expected an answer in the column {self.column!r}")
        return gives(completion, str(reference))
