"""The pipelines of DASD and of prompt synthesis, from end to end, with models that say what a test wants."""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kdlm.curation import Pipeline, run
from kdlm.data.encoding import Encoder
from kdlm.data.forms import recognise
from kdlm.data.sections import DataSection, Source
from kdlm.models import named
from kdlm.recipe import load
from kdlm.section_loader import load_section
from kdlm.signal import IGNORE_INDEX
from kdlm.writers import Answered, LocalSection, Scored, Text

FOLDER = Path(__file__).parents[2] / "recipes" / "pipelines"


class Scripted:
    """Answers by a function of the prompt and the number of the try; finds long texts less likely, by its `nats`."""

    at_once, choices, revision = 1, 100, None

    def __init__(self, path: str, answer: Any, nats: float):
        self.model, self.answer, self.nats = path, answer, nats
        self.tries: dict[str, int] = {}

    def write(self, asked: Any) -> Iterator[tuple[int, Answered]]:
        for place, one in enumerate(asked):
            texts = []
            for _ in range(one.sampling.samples_per_prompt):
                number = self.tries[one.prompt] = self.tries.get(one.prompt, -1) + 1
                text = self.answer(one.prompt, number)
                texts.append(Text(text, "end" if text.endswith(".") or "Answer" in text else "length", len(text)))
            yield place, Answered(texts, 1)

    def score(self, pairs: Any) -> Iterator[tuple[int, Scored]]:
        for place, (_, text) in enumerate(pairs):
            starts = [match.start() for match in re.finditer(r"\S+", text)]
            yield place, Scored([-self.nats * (1 + len(text) % 3)] * len(starts), starts)

    def close(self) -> None:
        pass


@pytest.fixture
def scripted(monkeypatch):
    """Have the local writers of a pipeline be scripted, by their path."""
    made: dict[str, Any] = {}
    monkeypatch.setattr(LocalSection, "open", lambda self, place: made[self.path])
    return made


def rows_of(name: str, folder: Path, **change: Any) -> Any:
    plan = load_section(Pipeline, FOLDER / f"{name}.yaml")
    return run(plan.model_copy(update={"output": folder, **change}), lambda line: None)


def test_what_the_student_began_the_teacher_ends_and_all_of_it_is_trained_on(scripted, tmp_path):
    begun = "I add the ones and then I add the tens and"
    scripted["sandbox:code-student-tiny"] = Scripted("student", lambda prompt, n: begun, 1.0)
    scripted["sandbox:code-teacher-tiny"] = Scripted("teacher", lambda prompt, n: " so it is done.", 1.0)
    rows = rows_of("mixed_policy", tmp_path / "one")
    assert len(rows) == 64 and len(set(rows["prefix"])) > 3
    for row in rows:
        assert begun.startswith(row["prefix"]) and row["completion"] == row["prefix"] + " so it is done."
    assert rows_of("mixed_policy", tmp_path / "again").to_list() == rows.to_list()

    tokenizer = named("sandbox:code-student-tiny").tokenizer()
    source = Source(path=str(tmp_path / "one/rows.parquet"), columns={"prompt": "prompt", "completion": "completion"})
    data = DataSection(train=[source], max_length=256)
    encoded: Any = Encoder(tokenizer, data, recognise(source, rows.column_names))([("row 0", rows[0])])[0]
    trained = [label for label in encoded.sequences[0].labels if label != IGNORE_INDEX]
    assert tokenizer.decode(trained, skip_special_tokens=True) == rows[0]["completion"]


def sizes(tries: Any) -> list[int]:
    """Return what `Scripted` multiplies its nats with, for each try."""
    return [1 + len(tries("", number)) % 3 for number in range(8)]


def test_of_each_prompts_tries_the_one_with_the_widest_gap_is_kept(scripted, tmp_path):
    def tries(prompt: str, number: int) -> str:
        return "One. Two." + "!" * number

    scripted["sandbox:code-teacher-tiny"] = Scripted("teacher", tries, 0.1)
    scripted["sandbox:code-student-tiny"] = Scripted("student", tries, 1.0)
    rows = rows_of("divergence_sampling", tmp_path)
    assert len(rows) == len(set(rows["prompt_id"])) == 64
    assert set(rows["teacher_sentences"]) == {1.0}
    gaps = {number: math.exp(-0.1 * size) - math.exp(-size) for number, size in enumerate(sizes(tries))}
    assert all(gaps[row["sample"]] == pytest.approx(max(gaps.values())) for row in rows)


def test_the_best_rationale_becomes_a_row_for_generator_and_explainer(scripted, tmp_path):
    model = Scripted("both", lambda prompt, n: " " + "because " * (n + 1) + ".", 1.0)
    scripted["sandbox:code-student-tiny"] = model
    rows = rows_of("prompt_expectation", tmp_path)
    assert sorted(set(rows["task"])) == ["explainer", "generator"] and len(rows) == 80
    for row in rows:
        assert row["prompt"].startswith(f"Concepts: {row['concepts']}")
        assert (row["problem"] in row["prompt"]) == (row["task"] == "explainer")
        assert (row["problem"] in row["completion"]) == (row["task"] == "generator")
    best = {row["problem"]: row["reward"] for row in rows}
    kept = [row for row in rows if row["task"] == "generator"]
    assert [best[row["problem"]] for row in kept] == [row["reward"] for row in kept]


def test_new_problems_get_the_answer_of_most_and_those_always_solved_are_left_out(scripted, tmp_path):
    def problem(prompt: str, number: int) -> str:
        return f" some {number}\nProblem: What is 1 + {number}?" if number else " of no form"

    def solution(prompt: str, number: int) -> str:
        right = int(re.findall(r"\d+", prompt)[-1]) + 1
        return f"Answer: {right + (number == 0 and right != 2)}"  # all agree on 1 + 1

    scripted["sandbox:code-student-tiny"] = Scripted("generator", problem, 1.0)
    scripted["sandbox:code-teacher-tiny"] = Scripted("solver", solution, 1.0)
    rows = rows_of("prompt_synthesis", tmp_path)
    assert set(rows["prompt"]) == {"What is 1 + 2?", "What is 1 + 3?"}
    assert {row["answer"] for row in rows if row["prompt"] == "What is 1 + 3?"} == {"4"}
    assert all(row["completion"] == f"Answer: {row['answer']}" and row["votes"] == 7 for row in rows)


def test_the_stages_of_training_follow_one_another_and_each_reads_what_its_pipeline_wrote():
    folder = FOLDER.parent / "sandbox" / "dasd"
    low, high, mixed = (load(folder / f"{name}.yaml") for name in ("low", "high", "mixed"))
    assert [stage.student.path for stage in (high, mixed)] == [f"./{stage.run_dir}/student" for stage in (low, high)]
    reads = [[source.path for source in stage.data.train] for stage in (low, high, mixed)]
    output = [
        load_section(Pipeline, FOLDER / f"{name}.yaml").output for name in ("divergence_sampling", "mixed_policy")
    ]
    written = [f"./{folder}/rows.parquet" for folder in (output[0], f"{output[0]}-high", output[1])]
    assert reads == [[written[0]], [written[1]], [written[2], written[1]]]
