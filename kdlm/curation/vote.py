"""The step `vote`: the answer that most completions of a prompt come to."""

from collections import Counter, defaultdict
from collections.abc import Hashable
from typing import Any, Literal

from datasets import Dataset
from pydantic import Field

from kdlm.curation.rows import with_columns
from kdlm.curation.step import Desk, Step, lacks
from kdlm.sandbox.tasks import final_answer
from kdlm.verifiers.numbers import only_number


class Vote(Step):
    """Labels each prompt by majority (self-consistency, arXiv 2203.11171): adds the answer, `votes` and `vote_share`.

    Prompts without a majority are left out and counted. `verify` with the same column follows; `filter` on `vote_share`
    leaves out what is solved always, of which nothing can be learned. The majority may be wrong, most of all on the
    hardest prompts: a larger share is surer.
    """

    name: Literal["vote"] = "vote"
    column: str = "completion"
    """The column whose final answers vote, after the last `Answer:` or `####`, or in the last `\\boxed{}`: numbers by
    value, other text letter by letter. One line without any is an answer as a whole; a completion that has none counts,
    for none."""
    into: str = "answer"
    """The column that takes the answer."""
    above: float = Field(0.5, ge=0, lt=1)
    """The share of a prompt's completions that an answer has to be above."""

    def run(self, rows: Dataset, desk: Desk) -> Dataset:
        self.leaves(rows.column_names)
        groups: dict[str, list[int]] = defaultdict(list)
        for number, key in enumerate(rows["prompt_id"]):
            groups[key].append(number)
        texts, told = rows[self.column][:], {}
        for key, numbers in groups.items():
            answer, votes = majority([texts[number] for number in numbers])
            if answer is None or votes <= self.above * len(numbers):
                desk.counts.note("no majority", f"{key}: {votes} of {len(numbers)}", len(numbers))
                continue
            told |= {number: (answer, votes, votes / len(numbers)) for number in numbers}
        desk.counts.figures["prompts with a majority"] = (
            f"{sum(numbers[0] in told for numbers in groups.values())} of {len(groups)}"
        )
        kept = sorted(told)
        columns = zip(*(told[number] for number in kept), strict=True) if kept else ([], [], [])
        names = (self.into, "votes", "vote_share")
        return with_columns(
            rows.select(kept), {name: list(values) for name, values in zip(names, columns, strict=True)}
        )

    def leaves(self, before: list[str]) -> list[str]:
        lacks(before, "prompt_id", self.column, by="vote")
        return list(dict.fromkeys([*before, self.into, "votes", "vote_share"]))


def majority(texts: list[str | None]) -> tuple[str | None, int]:
    """Return the answer that most texts come to, as the first of them writes it, and how many do; None where there is
    no answer, or two have as many.
    """
    answers = [final_answer(text or "") for text in texts]
    written: dict[Hashable, str] = {}
    votes: Counter[Any] = Counter()
    for answer in answers:
        if answer is not None:
            number = only_number(answer)
            key = answer if number is None else number
            written.setdefault(key, answer)
            votes[key] += 1
    best = votes.most_common(2)
    if not best:
        return None, 0
    tied = len(best) == 2 and best[0][1] == best[1][1]
    return None if tied else written[best[0][0]], best[0][1]
