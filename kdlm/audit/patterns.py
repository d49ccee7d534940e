"""Patterns: things that the same documents hold, as one finding, known again in any text by its forms."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from kdlm.audit.words import Reading

Kind = Literal["words", "host", "name"]
ALIKE = 0.5
"""Share of the documents of either that two things must have in common, to be one pattern."""


@dataclass(frozen=True)
class Form:
    """Words in lower case with spaces between, a host, or a name as it is written."""

    kind: Kind
    text: str

    def within(self, text: Reading) -> bool:
        if self.kind == "words":
            return f" {self.text} " in text.words
        return self.text in (text.hosts if self.kind == "host" else text.names)


@dataclass(frozen=True)
class Pattern:
    """One finding: a text holds it when it holds one of its forms."""

    forms: tuple[Form, ...]

    def __str__(self) -> str:
        words = phrase([form.text for form in self.forms if form.kind == "words"])
        return words or ", ".join(form.text for form in self.forms)

    def answered(self, prompt: Reading, answer: Reading) -> bool:
        """Say whether an answer holds it where the prompt does not."""
        return any(form.within(answer) and not echoed(form, prompt) for form in self.forms)

    def asked(self, prompt: Reading) -> bool:
        """Say whether a prompt holds it."""
        return any(form.within(prompt) for form in self.forms)

    def as_json(self) -> list[dict[str, str]]:
        return [{"kind": form.kind, "text": form.text} for form in self.forms]

    @classmethod
    def of_json(cls, forms: list[dict[str, Any]]) -> "Pattern":
        return cls(tuple(Form(form["kind"], form["text"]) for form in forms))


def echoed(form: Form, prompt: Reading) -> bool:
    """Say whether a prompt holds a form; a name in whatever letters."""
    if form.kind == "name":
        return form.text.lower() in prompt.words
    return form.within(prompt)


@dataclass(frozen=True)
class Sighting:
    """A form that too many documents hold.

    Attributes:
        ours, theirs: the documents that hold it, by number, and how many of the reference do.
        p_value: adjusted for all that were tested.
    """

    form: Form
    ours: frozenset[int]
    theirs: int
    p_value: float


def gathered(sightings: Iterable[Sighting]) -> list[list[Sighting]]:
    """Put sightings of the same documents together, each group and the groups by p-value, the longest form first."""
    groups: list[list[Sighting]] = []
    for one in sorted(sightings, key=lambda one: (one.p_value, -len(one.form.text), one.form.text)):
        for group in groups:
            few, many = sorted((one.ours, group[0].ours), key=len)
            if len(few) >= ALIKE * len(many) <= len(few & many):
                group.append(one)
                break
        else:
            groups.append([one])
    return groups


def pattern_of(group: Sequence[Sighting]) -> Pattern:
    """Return the pattern of a group: of its words those that no longer ones of it hold."""
    forms = [one.form for one in group]
    words = [form for form in forms if form.kind == "words"]
    return Pattern(tuple(form for form in forms if form.kind != "words" or _maximal(form, words)))


def _maximal(form: Form, others: Sequence[Form]) -> bool:
    return not any(form != other and f" {form.text} " in f" {other.text} " for other in others)


def phrase(texts: Sequence[str]) -> str:
    """Return runs of words as the longest text that those which overlap by all but a word make, the others left out."""
    runs = [text.split() for text in texts]
    best: list[str] = []
    for run in runs:
        left = [other for other in runs if other != run]
        grown = list(run)
        while step := next((one for one in left if len(one) > 1 and grown[-len(one) + 1 :] == one[:-1]), None):
            grown.append(step[-1])
            left.remove(step)
        best = max(best, grown, key=len)
    return " ".join(best)
