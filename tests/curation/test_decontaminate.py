"""Rows that hold a piece of an evaluation set leave, named with the item that they meet; no other row does."""

import json
import random

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as some

from kdlm.curation import Decontaminate, Desk, Pipeline, run

DRAWN = random.Random(0)
VOCABULARY = ["".join(DRAWN.choices("bcdfghklmnprst", k=6)) for _ in range(500)]
TEMPLATE = "answer the following question carefully and give only the final number at the very end"


def problem(length: int = 30) -> str:
    return " ".join(DRAWN.choices(VOCABULARY, k=length))


ITEMS = [*(f"{TEMPLATE} {problem()}" for _ in range(20)), "What is 12 + 35?", f"{TEMPLATE} now"]
CLEAN = [f"{TEMPLATE} {problem()}" for _ in range(50)]


@pytest.fixture
def against(tmp_path):
    file = tmp_path / "exam.jsonl"
    file.write_text("".join(json.dumps({"prompt": item, "answer": "7"}) + "\n" for item in ITEMS))
    return [{"path": str(file)}]


def step(against, **options) -> Decontaminate:
    return Decontaminate.model_validate({"against": against, **options})


def rows_of(prompts: list[str]) -> Dataset:
    return Dataset.from_dict({"prompt": prompts, "level": list(range(len(prompts)))})


def piece(item: str, words: int) -> str:
    return " ".join(item.split()[16 : 16 + words])


def test_planted_pieces_leave_and_nothing_else(against):
    pieces = [f"{problem(5)}, {piece(item, 13).upper()}! {problem(5)}" for item in ITEMS[:5]]
    desk = Desk()
    kept = step(against).run(rows_of([*CLEAN, *pieces]), desk)
    assert kept["prompt"] == CLEAN
    assert kept.column_names == ["prompt", "level"]
    (found,) = desk.counts.kinds.values()
    assert found.count == 5
    place = against[0]["path"]
    assert found.examples[0].startswith(f"row 50 meets {place}:1, share 0.")
    assert piece(ITEMS[0], 10) in found.examples[0]
    assert desk.counts.figures["evaluation items"] == 22
    assert desk.counts.figures["evaluation items met"] == "5 of 22"


def test_twelve_words_in_common_are_not_enough(against):
    rows = rows_of([f"{problem(5)} {piece(ITEMS[0], 12)} {problem(5)}"])
    assert len(step(against)(rows)) == 1
    assert len(step(against, words=12)(rows)) == 0


def test_a_template_of_the_evaluation_set_shows_nothing(against):
    desk = Desk()
    assert len(step(against).run(rows_of(CLEAN), desk)) == 50
    assert desk.counts.figures["runs in more than 10 items"].endswith("in 21 items")
    assert desk.counts.figures["found by their whole text alone"] == 2
    assert len(step(against, common=21)(rows_of(CLEAN))) == 0


def test_a_short_item_is_found_by_its_whole_text(against):
    rows = rows_of(
        [
            "what is 12 + 35",
            "What is 12 - 35?",
            "Say, what is 12 + 35?",
            '[{"role": "user", "content": "What is 12 + 35?"}]',
        ]
    )
    assert step(against)(rows)["level"] == [1, 2]


def test_a_share_asks_for_more_than_one_run(against):
    rows = rows_of([piece(ITEMS[0], 13), piece(ITEMS[0], 22), ITEMS[0]])
    assert step(against)(rows)["level"] == []
    assert step(against, share=0.3)(rows)["level"] == [0]
    assert step(against, share=1)(rows)["level"] == [0, 1]


def test_marked_rows_stay(against):
    marked = step(against, mark="met")(rows_of([CLEAN[0], ITEMS[3]]))
    assert marked["met"] == [None, f"{against[0]['path']}:4, share 1"]
    unmarked = step(against, mark="met")(rows_of(CLEAN))
    assert set(unmarked["met"]) == {None}
    assert str(unmarked.features["met"].dtype) == "string"


def test_completions_are_looked_through_where_that_is_asked_for(against):
    rows = Dataset.from_dict({"prompt": [CLEAN[0]] * 2, "completion": [f"It reads: {ITEMS[2]}", None]})
    assert len(step(against)(rows)) == 2
    assert step(against, columns=["prompt", "completion"])(rows)["completion"] == [None]


@settings(deadline=None, max_examples=20)
@given(some.permutations(range(8)))
def test_the_order_of_rows_changes_only_theirs(tmp_path_factory, order):
    file = tmp_path_factory.getbasetemp() / "order.jsonl"
    file.write_text("".join(json.dumps({"prompt": item}) + "\n" for item in ITEMS))
    rows, asked = rows_of([*CLEAN[:5], *ITEMS[:3]]), step([{"path": str(file)}])
    kept = asked(rows.select(order))
    assert kept["level"] == [number for number in order if number < 5]
    assert asked(kept).to_list() == kept.to_list()


def test_another_evaluation_set_is_another_output_and_a_missing_one_is_told_before_anything_is_done(against, tmp_path):
    source = tmp_path / "train.jsonl"
    source.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in [*CLEAN, ITEMS[0]]))
    plan = {
        "sources": [{"path": str(source)}],
        "steps": [{"name": "select", "count": 60}, {"name": "decontaminate", "against": against}],
        "output": str(tmp_path / "out"),
    }
    assert len(run(Pipeline.model_validate(plan), lambda line: None)) == 50
    with open(against[0]["path"], "a") as file:
        file.write(json.dumps({"prompt": CLEAN[7], "answer": "1"}) + "\n")
    assert len(run(Pipeline.model_validate(plan), lambda line: None)) == 49
    plan["steps"][1]["against"] = [{"path": str(tmp_path / "exams.jsonl")}]
    plan["output"] = str(tmp_path / "other")
    with pytest.raises(ValueError, match=r"did you mean .*exam\.jsonl"):
        run(Pipeline.model_validate(plan), lambda line: None)
    assert not (tmp_path / "other" / "steps").exists()


def test_a_system_message_that_an_evaluation_set_has_too_shows_nothing(tmp_path):
    system = {"role": "system", "content": " ".join(f"word{n}" for n in range(20))}
    question = {"role": "user", "content": " ".join(f"asked{n}" for n in range(20))}
    items = tmp_path / "items.jsonl"
    items.write_text(json.dumps({"messages": [system, question, {"role": "assistant", "content": "42"}]}) + "\n")
    talks = [[system, {"role": "user", "content": "another"}], [system, question], [question]]
    rows = Dataset.from_list([{"prompt": json.dumps(talk)} for talk in talks])
    left = Decontaminate.model_validate({"against": [{"path": str(items)}]})(rows)
    assert left["prompt"][:] == [json.dumps(talks[0])]
