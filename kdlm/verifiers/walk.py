"""The rule of the sandbox's walks, with feedback in words."""

from collections.abc import Mapping
from typing import Any, Literal

from kdlm.sandbox.walks import feedback, right
from kdlm.verifiers.verifier import Verifier, VerifierSection


class Walk(VerifierSection):
    """Every place of the walk is the reference's, in digits or letters. Where not, the reason says how it begins."""

    name: Literal["walk"] = "walk"

    def verifier(self) -> Verifier:
        return self._judge

    def _judge(self, completion: str, reference: Any, row: Mapping[str, Any]) -> Any:
        if reference is None:
            raise ValueError(f"no reference, expected a walk in the column {self.column!r}")
        if right(str(reference), completion):
            return True
        return {"score": 0.0, "reason": feedback(str(reference), completion)}
