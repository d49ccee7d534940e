"""What single documents give, and the figures of them, without a harness."""

import itertools
import json
import random

import numpy as np
import pytest
from sklearn.metrics import precision_recall_fscore_support

from kdlm.estimates import jackknife
from kdlm.jobs.tasks import entities, next_line, problems


def judged(asked: list[str], given: str) -> dict:
    return entities.counts({"answer": json.dumps(asked)}, [given])


def test_pass_at_k_is_the_share_of_draws_of_k_samples_with_a_right_one():
    for samples, right in [(8, 0), (8, 1), (8, 5), (8, 8), (5, 2)]:
        marks = [True] * right + [False] * (samples - right)
        for k in range(1, samples + 1):
            draws = list(itertools.combinations(marks, k))
            expected = sum(map(any, draws)) / len(draws)
            assert problems.pass_at(k, right=right, samples=samples) == pytest.approx(expected, abs=1e-15)


def test_pass_at_more_than_the_samples_is_refused():
    for k in (0, 9):
        with pytest.raises(ValueError, match="needs at least"):
            problems.pass_at(k, right=1, samples=8)


def test_entities_are_counted_by_hand():
    found = judged(["Ala Osman", "Bren Lund"], '["Ala Osman", "Bren", "Ala Osman"]')
    assert found == {**dict.fromkeys(("f1", "precision", "recall"), (1, 2, 1)), "malformed": 0.0}
    assert judged([], "[]")["f1"] == (0, 0, 0)
    assert judged(["x"], '["x"]<|im_end|>')["f1"] == (1, 0, 0)
    assert judged(["x", "x"], '["x"]')["f1"] == (1, 0, 1), "a mention counts as often as it is there"
    assert judged(["Osman"], '["osman"]')["f1"] == (0, 1, 1), "letter for letter"


@pytest.mark.parametrize(
    "given", ["", "none", '["x"', '["x"] or so', '{"a": "x"}', '"x"', "[1]", '["x", null]', "[" * 9999]
)
def test_an_answer_that_is_no_list_of_texts_is_malformed_and_misses_all(given):
    found = judged(["x", "y"], given)
    assert found["malformed"] == 1 and found["f1"] == (0, 0, 2)


def test_f1_precision_and_recall_are_those_of_scikit_learn_and_of_sums_over_documents():
    random.seed(0)
    names = ["a", "b", "c", "d"]
    said, truth, rows = [], [], []
    for _ in range(60):
        asked, given = (random.choices(names, k=random.randint(0, 4)) for _ in range(2))
        rows.append(judged(asked, json.dumps(given)))
        for name in names:  # the n-th mention of a name is there, or is not
            for n in range(1, 5):
                truth.append(asked.count(name) >= n)
                said.append(given.count(name) >= n)
    expected = precision_recall_fscore_support(truth, said, average="binary")
    for figure, theirs in zip((entities.precision, entities.recall, entities.f1), expected, strict=False):
        counts = [row[figure.__name__] for row in rows]
        assert figure(counts) == pytest.approx(theirs)
        estimate = jackknife(np.array(counts), lambda total, figure=figure: figure([total]))
        assert estimate.value == figure(counts) and 0.01 < estimate.error < 0.1


def test_figures_of_nothing_are_zero():
    assert entities.f1([(0, 0, 0)]) == entities.precision([(0, 0, 3)]) == entities.recall([(0, 3, 0)]) == 0


TRUE = "    if name and not name.startswith('.'):"
TEXT = f"import os\n\nfor name in os.listdir('.'):\n{TRUE}\n        print(name)\n\nx = 1\n"


def test_a_question_holds_the_true_line_once_and_its_words_in_every_choice():
    (question,) = [
        one for one in next_line.questions([{"path": "a.py", "text": TEXT}], n=9, seed=0) if one["line"] == 4
    ]
    assert question["choices"][question["gold"]] == TRUE and question["choices"].count(TRUE) == 1
    assert question["context"] == "import os\n\nfor name in os.listdir('.'):"
    for choice in question["choices"]:
        assert sorted(choice.split()) == sorted(TRUE.split()) and len(choice) == len(TRUE)
        changed = sum(a != b for a, b in zip(choice.split(" "), TRUE.split(" "), strict=True))
        assert changed in (0, 2), choice


def test_the_context_is_of_whole_lines_and_bounded():
    text = "\n".join(f"value_{i} = first {i} and second {i}" for i in range(200))
    for question in next_line.questions([{"path": "a.py", "text": text}], n=50, seed=0):
        assert len(question["context"]) <= next_line.CONTEXT
        assert text.startswith(question["context"]) or f"\n{question['context']}\n" in text


def test_lines_without_enough_different_orders_make_no_question():
    text = "first line of it\na a a a\none two three\n= = = = b\n"
    assert {one["line"] for one in next_line.questions([{"path": "a.py", "text": text}], n=9, seed=0)} == {4}
