"""Steps that make tasks, targets and questions of what a teacher said: tasks, fall_back, thoughts, entity_questions."""

import json
import re
from collections import Counter

import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from kdlm.curation import Desk, EntityQuestions, FallBack, Tasks, Thoughts
from kdlm.curation.entity_questions import drawn, entities_in
from kdlm.curation.templates import filled
from kdlm.curation.thoughts import parsed, styled
from kdlm.jobs.tasks.entities import counts, mentions

SENTENCE = st.from_regex(r"[a-z][a-z0-9 +=]{0,30}[a-z0-9]", fullmatch=True)
ANSWER = st.from_regex(r"-?[0-9]{1,6}", fullmatch=True)


def rewrites() -> Dataset:
    return Dataset.from_list(
        [
            {"prompt": "a", "completion": "given", "rewritten": "own", "score": 1.0},
            {"prompt": "b", "completion": "given", "rewritten": "wrong", "score": 0.0},
            {"prompt": "c", "completion": "given", "rewritten": None, "score": 1.0},
        ]
    )


def test_a_template_leaves_braces_alone_that_name_no_column():
    assert filled(r"\boxed{{answer}} {} {a b}", {"answer": 3}) == r"\boxed{3} {} {a b}"
    assert filled("{answer}", {"answer": None}) is None


def test_a_value_that_looks_like_a_column_is_not_filled_again():
    assert filled("{a}{b}", {"a": "{b}", "b": "x"}) == "{b}x"


def test_every_row_becomes_one_row_for_each_task():
    step = Tasks.model_validate(
        {
            "tasks": {
                "label": {"prompt": "[label] {prompt}", "completion": "{answer}"},
                "rationale": {"prompt": "[rationale] {prompt}", "completion": "{completion}"},
            }
        }
    )
    rows = Dataset.from_list([{"prompt": "1 + 1", "completion": "one and one", "answer": 2, "level": 1}])
    made = step(rows).to_list()
    assert [(row["task"], row["prompt"], row["completion"]) for row in made] == [
        ("label", "[label] 1 + 1", "2"),
        ("rationale", "[rationale] 1 + 1", "one and one"),
    ]
    assert {row["level"] for row in made} == {1}


def test_only_a_rewrite_that_passes_takes_the_place_of_the_original():
    step, desk = FallBack.model_validate({"where": [{"column": "score", "at_least": 1}]}), Desk()
    made = step.run(rewrites(), desk)
    assert made["completion"][:] == ["own", "given", "given"]
    assert made["taken"][:] == ["rewrite", "original", "original"]
    assert "rewritten" not in made.column_names
    assert desk.counts.kinds["the original kept"].count == 2


@given(st.lists(SENTENCE, min_size=1, max_size=6), ANSWER, st.sampled_from(["boxed", "line"]))
def test_thoughts_in_the_style_are_read_back_as_they_were_written(steps, answer, form):
    assert parsed(styled(steps, answer, form)) == ([step.strip() for step in steps], answer)


@pytest.mark.parametrize(
    "text",
    [
        "2 + 3: add\n= 5\nAnswer: 5",
        "2 + 3: add\n\n= 5\n\nThe answer is \\boxed{5}.",
        "Step 1: 2 + 3: add\nStep 2: = 5\n#### 5",
        "**Step 1:** 2 + 3: add\n\n**Step 2:** = 5\n\nFinal answer: 5",
    ],
)
def test_one_thought_in_many_hands_comes_out_in_one(text):
    assert parsed(text) == (["2 + 3: add", "= 5"], "5")


def test_thoughts_without_an_answer_or_with_too_many_steps_are_left_out_and_counted():
    rows = Dataset.from_list([{"completion": text} for text in ("a\nb\nAnswer: 1", "a\nb", "a\nb\nc\nAnswer: 1", "")])
    desk = Desk()
    made = Thoughts(most=2).run(rows, desk)
    assert made["completion"][:] == ["Step 1: a\n\nStep 2: b\n\nThe answer is \\boxed{1}."]
    assert {kind: found.count for kind, found in desk.counts.kinds.items()} == {
        "no final answer": 2,
        "too few or too many steps": 1,
    }


TEXT = "Ada Lund left Corham for Norham. Ada Lund wrote to Ivo Sen."
ANSWERED = json.dumps(
    [
        {"entity": "Corham", "type": "place"},
        {"entity": "Norham", "type": "place"},
        {"entity": "Ivo Sen", "type": "person"},
        {"entity": "Ada Lund", "type": "person"},
        {"entity": "Ada Lund", "type": "person"},
        {"entity": "Atlantis", "type": "place"},
        {"entity": "left", "type": "misc"},
    ]
)


def passages() -> Dataset:
    others = [["Gorax Bank paid.", [["Gorax Bank", "organisation"]]], ["On 3 May.", [["3 May", "date"]]]]
    return Dataset.from_list(
        [{"text": TEXT, "completion": ANSWERED}]
        + [{"text": text, "completion": f"```json\n{json.dumps(found)}\n```"} for text, found in others]
        + [{"text": "none", "completion": "There are none."}]
    )


def test_every_type_is_asked_for_and_answered_in_the_order_of_the_passage():
    desk = Desk()
    made = EntityQuestions(form="questions", negatives=0).run(passages(), desk).to_list()
    answers = {
        row["prompt"].split("\n")[1]: row["completion"] for row in made if row["prompt"].startswith(f"Text: {TEXT}")
    }
    assert answers == {
        "What describes person in the text?": '["Ada Lund", "Ivo Sen"]',
        "What describes place in the text?": '["Corham", "Norham"]',
    }
    assert {kind: found.count for kind, found in desk.counts.kinds.items()} == {
        "a mention that is not in the passage": 1,
        "a catch-all type": 1,
        "no list of entities": 1,
    }


def test_types_that_are_drawn_do_not_occur_in_the_passage_and_are_answered_by_an_empty_list():
    made = EntityQuestions(form="questions", negatives=2)(passages()).to_list()
    for passage in {row["prompt"].split("\n")[0] for row in made}:
        mine = [row for row in made if row["prompt"].startswith(f"{passage}\n")]
        empty = [row for row in mine if row["completion"] == "[]"]
        assert len(empty) == 2
        assert len({row["prompt"] for row in mine}) == len(mine)


def test_which_types_are_drawn_does_not_depend_on_the_order_of_the_passages():
    step = EntityQuestions(form="questions", negatives=1)
    there, back = step(passages()), step(passages().select([3, 2, 1, 0]))
    assert sorted(there["prompt"][:]) == sorted(back["prompt"][:])


def test_types_are_drawn_in_proportion_to_their_frequency():
    import random

    draw = random.Random(0)
    seen = Counter(drawn(Counter(a=9, b=1, c=5), {"c"}, 1, draw)[0] for _ in range(2000))
    assert abs(seen["a"] / 2000 - 0.9) < 0.03
    assert "c" not in seen


def test_a_conversation_gives_the_passage_first_and_then_asks_one_type_at_a_time():
    (first, *_) = EntityQuestions(negatives=0, dataset="letters")(passages()).to_list()
    roles = [message["role"] for message in first["messages"]]
    assert roles == ["user", "assistant"] * 3
    assert first["messages"][0]["content"] == f"Dataset: letters\nText: {TEXT}"
    assert all(mentions(message["content"]) is not None for message in first["messages"][3::2])


@pytest.mark.parametrize("text", ["", "{}", "[1]", '[["a"]]', '[{"entity": "a"}]', '[{"entity": "a", "type": null}]'])
def test_what_is_no_list_of_entities_is_none(text):
    assert entities_in(text) is None


@pytest.mark.parametrize(
    ("gold", "given", "expected"),
    [
        (["a", "a"], ["a"], (1, 0, 1)),  # a mention counts as often as it is there
        (["Ada"], ["ada"], (0, 1, 1)),  # letter for letter
        (["New York City"], ["New York"], (0, 1, 1)),  # a part of it is another mention
        ([], [], (0, 0, 0)),
        ([], ["a"], (0, 1, 0)),
    ],
)
def test_entities_are_scored_strictly(gold, given, expected):
    assert counts({"answer": json.dumps(gold)}, [json.dumps(given)])["f1"] == expected


def test_markers_of_steps_are_not_taken_from_the_middle_of_a_sentence():
    steps, answer = parsed("As in step 1: add\nthen stop\nAnswer: 2")
    assert steps == ["As in step 1: add", "then stop"]
    assert answer == "2"
    assert not re.search("Step", steps[0])


def test_tasks_of_a_conversation_are_conversations():
    talk = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "2 + 3"}]
    tasks = Tasks.model_validate({"tasks": {"label": {"prompt": "[label] {prompt}", "completion": "{answer}"}}})
    (row,) = tasks(Dataset.from_list([{"prompt": json.dumps(talk), "answer": "5"}]))
    assert json.loads(row["prompt"]) == [talk[0], {"role": "user", "content": "[label] 2 + 3"}]
    assert row["completion"] == "5"


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("First add.\n\nThen 42 - 2 = 40, so the answer is \\boxed{40}.", 2),
        ("2 + 2 = 4, so \\boxed{4}", 1),
        ("Add.\n\n**Answer:** 4", 1),
        ("Add.\n\nSo the final answer is $\\boxed{\u22124}$.", 1),
    ],
)
def test_a_last_line_that_says_more_than_the_answer_is_a_step(text, steps):
    found, answer = parsed(text)
    assert len(found) == steps
    assert parsed(styled(found, str(answer), "boxed")) == (found, answer)


@pytest.mark.parametrize(
    ("step", "have", "missing", "left"),
    [
        (Thoughts(), ["completion"], "completion", ["completion"]),
        (EntityQuestions(), ["text", "completion", "prompt", "id"], "text", ["id", "messages"]),
        (
            FallBack.model_validate({"where": [{"column": "score", "at_least": 1}]}),
            ["rewritten", "completion", "score"],
            "score",
            ["completion", "score", "taken"],
        ),
        (
            Tasks.model_validate({"tasks": {"label": {"prompt": "{question}", "completion": "{answer}"}}}),
            ["question", "answer"],
            "answer",
            ["question", "answer", "prompt", "completion", "task"],
        ),
    ],
)
def test_columns_are_known_before_a_model_is_asked(step, have, missing, left):
    assert step.leaves(have) == left
    with pytest.raises(ValueError, match=missing):
        step.leaves([name for name in have if name != missing])


def test_a_passage_that_is_null_is_counted():
    answer, desk = '[{"entity": "Ada", "type": "person"}]', Desk()
    rows = Dataset.from_list([{"text": text, "completion": answer} for text in (None, "Ada came.")])
    assert len(EntityQuestions().run(rows, desk)) == 1
    assert desk.counts.kinds["no list of entities"].count == 1
