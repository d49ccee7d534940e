"""The completion, or the answer it gives, is the reference letter by letter."""

from collections.abc import Mapping
from typing import Any, Literal

from kdlm.sandbox.tasks import final_answer
from kdlm.verifiers.verifier import Verifier, VerifierSection


class Exact(VerifierSection):
    """Equality of texts, as in the exact match of SQuAD (arXiv 1606.05250) without its dropping of articles."""

    name: Literal["exact"] = "exact"
    compare: Literal["completion", "answer"] = "completion"
    r"""`answer` compares what follows the last `Answer:` or `####`, or stands in the last `\boxed{}`; a completion of
    several lines without one is wrong."""
    strip: bool = True
    """Leave out white space at both ends."""
    ignore_case: bool = False
    """Take upper and lower case as the same."""
    normalise_whitespace: bool = False
    """Take any run of white space, line ends among it, as one space."""

    def verifier(self) -> Verifier:
        return self._judge

    def _judge(self, completion: str, reference: Any, row: Mapping[str, Any]) -> bool:
        if reference is None:
            raise ValueError(f"no reference, expected text in the column {self.column!r}")
        given: str | None = completion
        if self.compare == "answer":
            given, reference = final_answer(completion), final_answer(str(reference)) or reference
        return given is not None and self._plain(given) == self._plain(str(reference))

    def _plain(self, text: str) -> str:
        text = " ".join(text.split()) if self.normalise_whitespace else text
        text = text.strip() if self.strip else text
        return text.casefold() if self.ignore_case else text
