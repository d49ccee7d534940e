"""The step `generate`: a writer continues the prompt of every row, several times."""

import json
from collections.abc import Iterator
from itertools import islice
from typing import Any, Literal, NamedTuple

import pyarrow as pa
from datasets import Dataset
from pydantic import Field, field_validator, model_validator

from kdlm.curation.asking import Asking, Bill, drawn_by, name_of
from kdlm.curation.memory import Memory
from kdlm.curation.prompts import asked_of
from kdlm.curation.rows import as_text
from kdlm.curation.step import Desk, Step, digest, lacks
from kdlm.curation.templates import check_template, columns_of
from kdlm.data.report import Unusable
from kdlm.rollouts import Sampling
from kdlm.writers import Prompt

OWN = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("sample", pa.int32()),
        ("completion", pa.string()),
        ("model", pa.string()),
        ("revision", pa.string()),
        ("sampling", pa.string()),
        ("seed", pa.int64()),
        ("stop", pa.string()),
        ("tokens", pa.int32()),
        ("log_prob", pa.float64()),
        ("log_probs", pa.list_(pa.float32())),
    ]
)
"""The columns that `generate` adds."""
ROWS_AT_ONCE = 4096
"""Rows that are made of Python's objects at a time."""


class Place(NamedTuple):
    """A row that is asked for: its number, the hash of what is asked, that of its prompt, how the text begins, and the
    prompt itself where rows keep it."""

    row: int
    key: str
    prompt_id: str
    beginning: str
    asked: str | None


class Generate(Step):
    """A writer continues the prompt of every row, several times; one row for each completion.

    Adds `prompt_id`, `sample`, `completion`, `model`, `revision`, `sampling`, `seed`, `stop`, `tokens`, `log_prob` and
    `log_probs`. Of rows that ask the same, the first is kept.
    """

    name: Literal["generate"] = "generate"
    by: str
    """The writer, by its name among `writers`."""
    sampling: list[Sampling] = Field([Sampling()], min_length=1)
    """How completions are drawn; several entries make a sweep, such as over temperatures."""
    prompt: str = "{prompt}"
    """What is asked, with the columns of a row in braces: "Solve step by step: {prompt}". Braces around what is no
    name stay. Messages stay messages, and it is their last one that is written so."""
    system: str | None = None
    """A system message before the prompt, which makes it a conversation."""
    chat: bool = False
    """Ask a prompt that is text as the message of a user, by the model's chat template."""
    keep_asked: bool = False
    """Put what was asked in the place of `prompt`: with its template and system message, a conversation where it was
    one. So the student is trained on what the writer answered, and `score` reads it as it was."""
    into: str = "completion"
    """The column that takes the text. Any but `completion` leaves one row for each row, and names who wrote it in a
    column `<into>_by`."""
    prefix: str | None = None
    """A column that the completion begins with: the writer goes on from there, and the text holds both. `tokens` and
    `log_prob` are of what the writer wrote."""
    log_probs: bool = False
    """Keep the log-probability of every token."""
    budget: float | None = Field(None, gt=0)
    """Most that the answers of this step may cost, those of earlier runs counted, by the `prices` of the writer. No
    request is made that would go beyond it, taken to be as dear as the others were; the run then ends."""

    @field_validator("sampling", mode="before")
    @classmethod
    def _one(cls, value: Any) -> Any:
        return [value] if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _one_of_each(self) -> "Generate":
        if self.into != "completion" and sum(one.samples_per_prompt for one in self.sampling) > 1:
            raise ValueError(f"into: {self.into}: takes one text for each row: ask for one sample")
        if self.into != "completion" and self.keep_asked:
            raise ValueError(f"keep_asked: the prompt stays that of `completion`; {self.into} is beside: remove it")
        drawn = [drawn_by(one) for one in self.sampling]
        for number, one in enumerate(self.sampling):
            if one.teacher_share:
                raise ValueError("sampling.teacher_share: is for rollouts of a student: remove it")
            if one.temperature == 0 and one.samples_per_prompt > 1:
                raise ValueError("sampling.samples_per_prompt: at temperature 0 completions are all alike: ask for 1")
            if drawn[number] in drawn[:number]:
                raise ValueError(f"sampling.{number}: as an entry before it: raise samples_per_prompt there instead")
        return self

    def asks(self) -> dict[str, str]:
        return {"by": self.by}

    def settings(self) -> dict[str, Any]:
        return self.model_dump(mode="json", exclude={"budget"})

    def leaves(self, before: list[str]) -> list[str]:
        lacks(before, "prompt", *([self.prefix] if self.prefix else []), by="generate")
        check_template(self.prompt, before, "generate.prompt")
        added = OWN.names if self.into == "completion" else [self.into, f"{self.into}_by"]
        return [*(name for name in before if name not in added), *added]

    def run(self, rows: Dataset, desk: Desk) -> Dataset:
        self.leaves(rows.column_names)
        places, asked = self._asked(rows, desk)
        bill = Bill(desk.writers[self.by].costs, self.budget)
        if self.budget is not None and bill.prices is None:
            raise ValueError(f"generate.budget: writers.{self.by} has no `prices`, so that nobody knows what it costs")
        memories: list[Memory] = []
        try:
            for sampling in self.sampling:
                memories.append(self._memory(sampling, desk, bill))
            for sampling, memory in zip(self.sampling, memories, strict=True):
                self._ask(asked, sampling, memory, desk, bill)
            self._tell(bill, desk)
            table = pa.concat_tables(self._tables(rows, places, memories, desk), promote_options="permissive")
        finally:
            for memory in memories:
                memory.close()
        return Dataset(table)

    def _asked(self, rows: Dataset, desk: Desk) -> tuple[list[Place], dict[str, Prompt]]:
        """Return the rows that are asked for, and what is asked by its hash, both in the order of the rows."""
        places: list[Place] = []
        asked: dict[str, Prompt] = {}
        read = ["prompt", "tools", *columns_of(self.prompt), *([self.prefix] if self.prefix else [])]
        columns = rows.select_columns([name for name in dict.fromkeys(read) if name in rows.column_names])
        for number, row in enumerate(columns):
            values: dict[str, Any] = dict(row)
            try:
                prompt, begun = self._prompts(values)
            except Unusable as why:
                desk.counts.note(f"not asked, {why.reason}", f"row {number}: {why.detail}")
                continue
            if (key := prompt_id(begun)) in asked and self.into == "completion":
                desk.counts.note("the same prompt again", f"row {number}: {key}")
                continue
            asked.setdefault(key, begun)
            beginning = (values[self.prefix] or "") if self.prefix else ""
            said = as_text(prompt) if self.keep_asked else None
            places.append(Place(number, key, prompt_id(prompt), beginning, said))
        if not asked and len(rows):
            raise ValueError("\n".join(["generate: there is nothing to ask", *desk.counts.lines()]))
        return places, asked

    def _prompts(self, row: dict[str, Any]) -> tuple[Prompt, Prompt]:
        """Return what is asked for a row, and the same with the beginning of the answer where there is one.

        Raises Unusable where a row cannot be asked.
        """
        prompt = asked_of(row, self.prompt, self.system, chat=self.chat)
        if not (beginning := row[self.prefix] if self.prefix else None):
            return prompt, prompt
        if isinstance(prompt, str):
            return prompt, prompt + beginning
        return prompt, [*prompt, {"role": "assistant", "content": beginning}]

    def _memory(self, sampling: Sampling, desk: Desk, bill: Bill) -> Memory:
        about = {
            "writer": desk.writers[self.by].identity(),
            "sampling": drawn_by(sampling),
            "seed": desk.seed,
            "log_probs": self.log_probs,
        }

        def seen(key: str, value: Any) -> None:
            if any(value["used"]):
                bill.add(*value["used"])

        return Memory(None if desk.folder is None else desk.folder / "answers" / digest(about), about, seen)

    def _ask(self, asked: dict[str, Prompt], sampling: Sampling, memory: Memory, desk: Desk, bill: Bill) -> None:
        asking = Asking(memory, sampling, log_probs=self.log_probs, seed=desk.seed, bill=bill, counts=desk.counts)
        if asking.missing(asked):
            name = self.by if len(self.sampling) == 1 else f"{self.by} at temperature {sampling.temperature:g}"
            asking.ask(asked, desk.writer(self.by), name)
        if bill.spent and (left := asking.missing(asked)):
            raise ValueError(
                f"generate.budget: {bill.cost:.4g} of {self.budget:g} is spent, and {left} completions of {self.by} "
                "are missing: raise it, or ask for fewer (samples_per_prompt, a source's limit), and run again: what "
                "was answered is kept"
            )

    def _tell(self, bill: Bill, desk: Desk) -> None:
        desk.counts.figures["prompt tokens"] = bill.prompt_tokens
        desk.counts.figures["completion tokens"] = bill.completion_tokens
        if bill.prices is not None:
            desk.counts.figures["cost"] = bill.cost

    def _tables(self, rows: Dataset, places: list[Place], memories: list[Memory], desk: Desk) -> Iterator[pa.Table]:
        """Yield rows with what was written, as tables of bounded size; at least one, perhaps empty."""
        writer, whole = desk.writers[self.by].identity(), self.into == "completion"
        schema = OWN if whole else pa.schema([(self.into, pa.string()), (f"{self.into}_by", pa.string())])
        plain = rows.remove_columns([name for name in schema.names if name in rows.column_names])
        lines = self._lines(places, memories, writer, desk) if whole else self._beside(places, memories[0], writer)
        kept, done = {place.row: place.asked for place in places}, False
        while (some := list(islice(lines, ROWS_AT_ONCE))) or not done:
            table: pa.Table = plain.select([row for row, _ in some]).with_format("arrow")[:]  # pyright: ignore
            own = pa.Table.from_pylist([line for _, line in some], schema)
            for name in own.column_names:
                table = table.append_column(own.schema.field(name), own.column(name))
            if self.keep_asked:
                asked = pa.array([kept[row] for row, _ in some], pa.string())
                table = table.set_column(table.column_names.index("prompt"), "prompt", asked)
            yield table.replace_schema_metadata(None)
            done = True

    def _lines(
        self, places: list[Place], memories: list[Memory], writer: dict[str, Any], desk: Desk
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield the number of a row and our columns of it, for every completion."""
        for place in places:
            first = 0
            for sampling, memory in zip(self.sampling, memories, strict=True):
                for slot in range(sampling.samples_per_prompt):
                    if (name := name_of(place.key, slot)) not in memory:
                        continue
                    told = memory[name]
                    if not told["text"].strip():
                        desk.counts.note("empty completion", f"{place.key} sample {first + slot}")
                    logs = told["log_probs"]
                    yield (
                        place.row,
                        {
                            "prompt_id": place.prompt_id,
                            "sample": first + slot,
                            "completion": place.beginning + told["text"],
                            "model": writer.get("model"),
                            "revision": writer.get("revision"),
                            "sampling": json.dumps(drawn_by(sampling)),
                            **{key: told[key] for key in ("seed", "stop", "tokens")},
                            "log_prob": None if logs is None else sum(logs),
                            "log_probs": logs,
                        },
                    )
                first += sampling.samples_per_prompt

    def _beside(
        self, places: list[Place], memory: Memory, writer: dict[str, Any]
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield the number of a row and the text beside it, for every row that was asked for."""
        for place in places:
            name = name_of(place.key, 0)
            told = memory[name] if name in memory else None
            sampling = drawn_by(self.sampling[0])
            by = told and {
                "writer": writer,
                "sampling": sampling,
                **{key: told[key] for key in ("seed", "stop", "tokens")},
            }
            yield (
                place.row,
                {self.into: told and place.beginning + told["text"], f"{self.into}_by": by and json.dumps(by)},
            )


def prompt_id(prompt: Prompt) -> str:
    """Return the hash of what is asked: 16 hexadecimal digits."""
    return digest(prompt)
