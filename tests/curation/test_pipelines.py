"""The pipelines of the checkout are valid; a pipeline goes on where it was and never asks twice."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
from datasets import Dataset

from kdlm.curation import Desk, Filter, Generate, Pipeline, Verify, run
from kdlm.rollouts import Sampling
from kdlm.section_loader import load_section
from kdlm.verifiers import Numeric
from kdlm.writers import Answered, Asked, Refused, Text, WriterSection

FOLDER = Path(__file__).parents[2] / "recipes" / "pipelines"


class Adds(WriterSection):
    """Answers `2 + 3` with 5, and every second sample with 6; refuses what is no sum; counts what it is asked."""

    name: Literal["adds"] = "adds"
    model: ClassVar = "adds"
    revision: ClassVar = None
    at_once: ClassVar = 1
    choices: ClassVar = 4
    asked: ClassVar[list[Asked]] = []
    fails_after: ClassVar[int | None] = None

    def identity(self) -> dict[str, Any]:
        return {"model": "adds"}

    def open(self, place: str) -> Any:
        return self

    def write(self, asked: Sequence[Asked]) -> Iterator[tuple[int, Answered | Refused]]:
        for place, one in enumerate(asked):
            if Adds.fails_after is not None and len(Adds.asked) >= Adds.fails_after:
                raise KeyboardInterrupt
            Adds.asked.append(one)
            if "+" not in one.prompt:
                yield place, Refused("no sum")
                continue
            total = sum(map(int, str(one.prompt).split("+")))
            texts = [Text(f"Answer: {total + n % 2}", "end", 3) for n in range(one.sampling.samples_per_prompt)]
            yield place, Answered(texts, 3)

    def close(self) -> None:
        pass


@pytest.fixture(autouse=True)
def fresh():
    Adds.asked.clear()
    Adds.fails_after = None


def sums() -> Dataset:
    return Dataset.from_list([{"prompt": f"{a} + {b}", "answer": str(a + b)} for a in range(3) for b in range(2)])


def generate(samples: int = 4) -> Generate:
    return Generate(by="it", sampling=[Sampling(samples_per_prompt=samples)])


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_pipelines_of_the_checkout_are_valid(path):
    load_section(Pipeline, path)


def test_rejection_sampling_keeps_what_is_right():
    desk = Desk({"it": Adds()})
    rows = Verify(verifier=Numeric()).run(generate().run(sums(), desk), desk)
    assert len(rows) == 24
    assert set(rows["solved"]) == {2}
    assert set(rows["attempts"]) == {4}
    kept = Filter.model_validate({"where": [{"column": "score", "at_least": 1}]})(rows)
    assert [row["completion"] for row in kept] == [f"Answer: {row['answer']}" for row in kept]
    assert len(kept) == 12


def test_what_was_answered_before_a_kill_is_not_asked_again(tmp_path):
    desk = Desk({"it": Adds()}, tmp_path)
    Adds.fails_after = 4
    with pytest.raises(KeyboardInterrupt):
        generate().run(sums(), desk)
    Adds.fails_after = None
    rows = generate().run(sums(), Desk({"it": Adds()}, tmp_path))
    assert len(Adds.asked) == 6
    assert rows.to_list() == generate().run(sums(), Desk({"it": Adds()}, tmp_path / "other")).to_list()


def test_a_pipeline_that_is_done_does_nothing(tmp_path, monkeypatch):
    source = tmp_path / "sums.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in sums().to_list()))
    plan = {"sources": [{"path": str(source)}], "output": str(tmp_path / "out"), "writers": {}, "steps": []}
    plan["steps"] = [{"name": "filter", "where": [{"column": "answer", "one_of": ["2", "3"]}]}]
    first = run(Pipeline.model_validate(plan), lambda line: None)
    monkeypatch.setattr(Filter, "run", lambda *given: pytest.fail("run again"))
    assert run(Pipeline.model_validate(plan), lambda line: None).to_list() == first.to_list()
    assert len(first) == 3
