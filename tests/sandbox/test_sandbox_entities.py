import json
import re

import pytest

from kdlm.data.forms import read_completion
from kdlm.sandbox import SandboxData, build
from kdlm.sandbox.entities import TYPES, entities
from kdlm.sandbox.jsonl import read_jsonl
from kdlm.sandbox.tasks import LEVELS, verify

SHAPES = {
    "person": r"[A-Z][a-z]+ [A-Z][a-z]+(?:berg|dane|feld|kin|lund|man|sen)\b",
    "place": r"[A-Z][a-z]+(?:bury|ford|ham|haven|mere|stad|vale)\b",
    "organisation": r"[A-Z][a-z]+ (?:Bank|Institute|Mills|Press|Trading Company|Works)\b",
    "date": r"\d+ [A-Z][a-z]+ \d{4}\b",
    "money": r"\d+ (?:crowns|marks)\b",
}
"""What the mentions of each type look like, written down apart from how they are made."""


@pytest.fixture(params=LEVELS)
def tasks(request):
    return entities(seed=1, level=request.param, n=200)


def text_of(task) -> str:
    return re.search(r"Text: (.*)\n", task.prompt)[1].replace("On ", "on ").replace("Since ", "since ")


def test_the_answer_is_every_mention_of_the_type_in_its_order(tasks):
    for task in tasks:
        assert json.loads(task.answer) == re.findall(SHAPES[task.kind], text_of(task)), task.prompt
        assert task.prompt.endswith(f"What describes {task.kind} in the text? Answer with a JSON list.")
        assert task.completion == task.answer and verify(task, task.completion)


def test_a_text_says_no_name_twice_and_hides_none_in_a_name_of_another_type(tasks):
    for task in tasks:
        found = {kind: re.findall(shape, text_of(task)) for kind, shape in SHAPES.items()}
        everything = [mention for mentions in found.values() for mention in mentions]
        assert len(set(everything)) == len(everything) >= task.level
        for kind, mentions in found.items():
            others = [mention for other in found if other != kind for mention in found[other]]
            assert not any(one in other for one in mentions for other in others)


def test_every_type_is_asked_for_and_some_in_vain(tasks):
    assert {task.kind for task in tasks} == set(TYPES) == set(SHAPES)
    assert 0 < sum(task.answer == "[]" for task in tasks) < 0.25 * len(tasks)


def test_a_level_is_the_number_of_sentences(tasks):
    assert {text_of(task).count(".") for task in tasks} == {tasks[0].level}


def test_a_recipe_trains_on_them_and_no_question_is_in_both_files():
    train, evaluated = (read_jsonl(SandboxData(data="entities", file=file).resolve()) for file in ("train", "eval"))
    assert (len(train), len(evaluated)) == (5_000, 500)
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in evaluated}
    assert read_completion(train[0]) == (train[0]["prompt"], train[0]["answer"])
    assert build("entities").exists()
