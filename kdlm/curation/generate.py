"""The step `generate`: a writer continues the prompt of every row, several times."""

import hashlib
import json
from collections.abc import Iterator
from typing import Any, Literal

from datasets import Dataset
from pydantic import Field, field_validator, model_validator

from kdlm.curation.memory import Memory
from kdlm.curation.rows import dataset_of
from kdlm.curation.step import Desk, Step, as_prompt, need
from kdlm.rollouts import Sampling
from kdlm.sandbox.progress import console
from kdlm.writers import Answered, Asked, Prompt, Text

Drawn = tuple[Sampling, int, Text]
"""A completion, how it was drawn, and its number among those drawn so."""


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
    """What is asked, with the columns of a row in braces: "Solve step by step: {prompt}". Messages stay messages, and
    it is their last one that is written so."""
    system: str | None = None
    """A system message before the prompt, which makes it a conversation."""
    into: str = "completion"
    """The column that takes the text. Any but `completion` leaves one row for each row, and names who wrote it in a
    column `<into>_by`."""
    prefix: str | None = None
    """A column that the completion begins with: the writer goes on from there, and the text holds both. `tokens` and
    `log_prob` are of what the writer wrote."""
    log_probs: bool = False
    """Keep the log-probability of every token."""

    @field_validator("sampling", mode="before")
    @classmethod
    def _one(cls, value: Any) -> Any:
        return [value] if isinstance(value, dict) else value

    def asks(self) -> dict[str, str]:
        return {"by": self.by}

    @model_validator(mode="after")
    def _one_of_each(self) -> "Generate":
        if self.into != "completion" and sum(one.samples_per_prompt for one in self.sampling) > 1:
            raise ValueError(f"into: {self.into}: takes one text for each row: ask for one sample")
        if any(one.teacher_share for one in self.sampling):
            raise ValueError("sampling.teacher_share: is for rollouts of a student: remove it")
        return self

    def run(self, rows: Dataset, desk: Desk) -> Dataset:
        need(rows, "prompt", *([self.prefix] if self.prefix else []), by="generate")
        asked = self._asked(rows)
        made: dict[str, list[Drawn]] = {key: [] for key in asked}
        for sampling in self.sampling:
            for key, number, text in self._drawn(asked, sampling, desk):
                made[key].append((sampling, number, text))
        return dataset_of(list(self._rows(rows, made, desk)))

    def _asked(self, rows: Dataset) -> dict[str, Prompt]:
        """Return what is asked, by its hash, in the order of the rows."""
        asked: dict[str, Prompt] = {}
        for row in rows:
            prompt = self._begun(row)
            asked.setdefault(prompt_id(prompt), prompt)
        return asked

    def _prompt(self, row: Any) -> Prompt:
        return asked_of(row, self.prompt, self.system)

    def _begun(self, row: Any) -> Prompt:
        """Return what is asked, with the beginning of the answer where there is one."""
        prompt, beginning = self._prompt(row), row[self.prefix] if self.prefix else None
        if not beginning:
            return prompt
        return prompt + beginning if isinstance(prompt, str) else [*prompt, {"role": "assistant", "content": beginning}]

    def _drawn(self, asked: dict[str, Prompt], sampling: Sampling, desk: Desk) -> Iterator[tuple[str, int, Text]]:
        """Yield every completion of one sampling: those that are remembered, and the others when they are written."""
        about = {
            "writer": desk.writers[self.by].identity(),
            "sampling": sampling.model_dump(mode="json", exclude={"samples_per_prompt"}),
            "seed": desk.seed,
            "log_probs": self.log_probs,
        }
        folder = None if desk.folder is None else desk.folder / "answers" / digest(about)
        memory, wanted = Memory(folder, about), sampling.samples_per_prompt
        try:
            missing = [key for key in asked if len(memory.texts(key)) < wanted]
            if missing:
                writer = desk.writer(self.by)
                with console(f"{self.by}: {len(missing)} of {len(asked)} prompts", len(missing)) as advance:
                    requests = [
                        self._request(key, asked[key], sampling, len(memory.texts(key)), desk) for key in missing
                    ]
                    for place, answer in writer.write(requests):
                        if isinstance(answer, Answered):
                            memory.add(missing[place], answer)
                        else:
                            desk.counts.note("refused by the writer", f"{missing[place]}: {answer.reason}")
                        advance(1, "")
            for key in asked:
                for number, text in enumerate(memory.texts(key)[:wanted]):
                    yield key, number, text
        finally:
            memory.close()

    def _request(self, key: str, prompt: Prompt, sampling: Sampling, known: int, desk: Desk) -> Asked:
        left = sampling.model_copy(update={"samples_per_prompt": sampling.samples_per_prompt - known})
        return Asked(prompt, left, seed_of(desk.seed, key, known), self.log_probs)

    def _rows(
        self, rows: Dataset, made: dict[str, list[tuple[Sampling, int, Text]]], desk: Desk
    ) -> Iterator[dict[str, Any]]:
        writer = desk.writers[self.by].identity()
        seen: set[str] = set()
        for row in rows:
            values: dict[str, Any] = dict(row)
            key = prompt_id(self._begun(values))
            beginning = (values[self.prefix] or "") if self.prefix else ""
            if self.into != "completion":
                yield values | self._beside(made[key], writer, beginning)
                continue
            if key in seen:
                desk.counts.note("the same prompt again", key)
                continue
            seen.add(key)
            for number, (sampling, first, text) in enumerate(made[key]):
                if not text.text.strip():
                    desk.counts.note("empty completion", f"{key} sample {number}")
                yield values | {
                    "prompt_id": prompt_id(self._prompt(values)),
                    "sample": number,
                    "completion": beginning + text.text,
                    "model": writer.get("model") or writer.get("path"),
                    "revision": writer.get("revision"),
                    "sampling": sampling.model_dump_json(exclude={"samples_per_prompt", "teacher_share"}),
                    "seed": seed_of(desk.seed, key, first),
                    "stop": text.stop,
                    "tokens": text.tokens,
                    "log_prob": None if text.log_probs is None else sum(text.log_probs),
                    "log_probs": text.log_probs,
                }

    def _beside(self, made: list[Drawn], writer: dict[str, Any], beginning: str) -> dict[str, Any]:
        if not made:
            return {self.into: None, f"{self.into}_by": None}
        sampling, _, text = made[0]
        said = {
            "writer": writer,
            "sampling": sampling.model_dump(mode="json"),
            "stop": text.stop,
            "tokens": text.tokens,
        }
        return {self.into: beginning + text.text, f"{self.into}_by": json.dumps(said)}


def asked_of(row: Any, template: str, system: str | None) -> Prompt:
    """Return the prompt of a row as a model is asked: written by a template, with a system message before it."""
    columns = {name: value for name, value in row.items() if value is not None}
    prompt = as_prompt(row["prompt"])
    if isinstance(prompt, str) and system is None:
        return template.format(**columns)
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    last = template.format(**(columns | {"prompt": messages[-1]["content"]}))
    before = [] if system is None else [{"role": "system", "content": system}]
    return [*before, *messages[:-1], {**messages[-1], "content": last}]


def prompt_id(prompt: Prompt) -> str:
    """Return the hash of what is asked: 16 hexadecimal digits."""
    return digest(prompt)


def digest(value: Any) -> str:
    """Return a hash of plain data: 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:16]


def seed_of(seed: int, key: str, first: int) -> int:
    """Return the seed of a request: of the pipeline's, what is asked, and how many of its answers are known."""
    return int(digest([seed, key, first])[:12], 16)
