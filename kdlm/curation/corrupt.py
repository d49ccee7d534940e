"""The step `corrupt`: the same answer in a broken form, to be avoided."""

import re
from typing import Any, Literal

from datasets import Dataset
from pydantic import Field

from kdlm.curation.rows import dataset_of
from kdlm.curation.step import Desk, Step, digest, lacks
from kdlm.section import Section

Corruption = Literal["bare_thought", "bare_answer", "unclosed", "swapped", "misnamed"]


class TagForm(Section):
    """A completion of two tagged parts, each there once, in this order, and nothing but white space around them."""

    thought: str = Field("think", pattern=r"^\w+$")
    """The tag of the reasoning."""
    answer: str = Field("answer", pattern=r"^\w+$")
    """The tag of the answer."""

    def parts(self, text: str) -> tuple[str, str] | None:
        """Return the reasoning and the answer of a completion that keeps the form; None of one that does not."""
        inside = rf"((?:(?!</?(?:{self.thought}|{self.answer})>).)*)"
        thought, answer = (rf"<{tag}>{inside}</{tag}>" for tag in (self.thought, self.answer))
        found = re.fullmatch(rf"\s*{thought}\s*{answer}\s*", text, re.DOTALL)
        return None if found is None else (found[1], found[2])

    def answer_in(self, text: str) -> str:
        """Return the answer of a completion of any form: what its tag holds, else the last line of words."""
        if found := re.findall(rf"<{self.answer}>(.*?)</{self.answer}>", text, re.DOTALL):
            return found[-1].strip()
        lines = [line.strip() for line in re.sub(r"</?\w+>", "", text).splitlines() if line.strip()]
        return lines[-1] if lines else ""

    def broken(self, how: Corruption, thought: str, answer: str) -> str:
        """Return the two parts in a form that is broken in one way."""
        one, other = f"<{self.thought}>{thought}</{self.thought}>", f"<{self.answer}>{answer}</{self.answer}>"
        forms: dict[Corruption, str] = {
            "bare_thought": f"{thought}\n{other}",
            "bare_answer": f"{one}\n{answer}",
            "unclosed": f"<{self.thought}>{thought}\n{other}",
            "swapped": f"{other}\n{one}",
            "misnamed": f"<{self.thought}ing>{thought}</{self.thought}ing>\n<{self.answer}s>{answer}</{self.answer}s>",
        }
        return forms[how]


class Corrupt(Step):
    """Sets a completion against itself in a broken form, so that a preference teaches form and no content.

    SPECS (arXiv 2510.25801, by third-party notes) rejects five forms and does not say there which: these are ours. Adds
    `chosen`, `rejected` and `corruption`, in place of `completion`. Left out and counted: completions that do not keep
    the form themselves, and those whose answer could not be found again in the broken one.
    """

    name: Literal["corrupt"] = "corrupt"
    form: TagForm = TagForm()
    """The form to be learned."""
    corruptions: list[Corruption] = Field(
        ["bare_thought", "bare_answer", "unclosed", "swapped", "misnamed"], min_length=1
    )
    """`bare_thought` and `bare_answer` lack the tags of that part, `unclosed` the end of the reasoning; `swapped` has
    the answer first; `misnamed` has other tags."""
    per_row: int = Field(1, ge=1)
    """How many of them a completion is set against, drawn by the pipeline's seed."""

    def leaves(self, before: list[str]) -> list[str]:
        lacks(before, "prompt", "completion", by="corrupt")
        return [*(name for name in before if name != "completion"), "chosen", "rejected", "corruption"]

    def run(self, rows: Dataset, desk: Desk) -> Dataset:
        self.leaves(rows.column_names)
        made: list[dict[str, Any]] = []
        for number, row in enumerate(rows):
            values: dict[str, Any] = dict(row)
            text = values.pop("completion") or ""
            parts = self.form.parts(text)
            if parts is None:
                desk.counts.note("completions that do not keep the form", f"row {number}")
                continue
            for how in self._drawn(desk.seed, values["prompt"], text):
                broken = self.form.broken(how, *parts)
                if self.form.parts(broken) is not None or self.form.answer_in(broken) != parts[1].strip():
                    desk.counts.note(f"completions whose answer is lost when {how}", f"row {number}")
                    continue
                made.append(values | {"chosen": text, "rejected": broken, "corruption": how})
        if not made:
            raise ValueError("\n".join(["corrupt: no completion can be used", *desk.counts.lines()]))
        return dataset_of(made)

    def _drawn(self, seed: int, prompt: str, text: str) -> list[Corruption]:
        return sorted(set(self.corruptions), key=lambda how: digest([seed, prompt, text, how]))[: self.per_row]
