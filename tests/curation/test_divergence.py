"""Sentences are found by their characters, whatever the tokenizer; equal models share all of them."""

import math
import random

import pytest
from datasets import Dataset

from kdlm.curation import Desk
from kdlm.curation.cut import Cut
from kdlm.curation.divergence import Divergence
from kdlm.curation.sentences import sentence_probabilities, sentence_starts

TEXT = "Pi is 3.14. Is it? (Yes.) So:\n2 + 2 = 4\n\nDone  "


def pieces(text: str) -> list[str]:
    starts = sentence_starts(text)
    return [text[a:b] for a, b in zip(starts, [*starts[1:], None], strict=False)]


def row(teacher: list[float], student: list[float], text: str = TEXT) -> dict:
    """A row with one token at the start of each sentence."""
    starts = sentence_starts(text)
    scores = {"teacher": teacher, "student": student}
    own = {f"{name}_log_probs": [math.log(p) for p in values] for name, values in scores.items()}
    return {"prompt": "p", "completion": text} | own | {f"{name}_offsets": starts for name in scores}


def test_sentences_end_at_marks_and_line_breaks_and_make_up_the_text():
    assert pieces(TEXT) == ["Pi is 3.14.", " Is it?", " (Yes.)", " So:", "\n2 + 2 = 4", "\n\nDone  "]
    assert pieces("") == []
    assert pieces("  a") == ["  a"]
    assert pieces("好。是") == ["好。", "是"]
    for seed in range(200):
        text = "".join(random.Random(seed).choices("a. \n?!)。", k=30))
        assert "".join(pieces(text)) == text


@pytest.mark.parametrize("length", [1, 2, 7, 100])
def test_the_probability_of_a_sentence_does_not_depend_on_its_length(length):
    values = sentence_probabilities([math.log(0.3)] * length, list(range(length)), [0])
    assert values == [pytest.approx(0.3)]


def test_tokens_of_another_tokenizer_count_in_the_sentence_they_begin_in():
    starts = sentence_starts("One. Two. Three.")
    few = sentence_probabilities([math.log(0.5), math.log(0.1)], [0, 9], starts)
    assert few == [pytest.approx(0.5), None, pytest.approx(0.1)]


def test_equal_models_share_every_sentence():
    values = [0.9, 0.1, 0.5, 0.5, 1.0, 0.01]
    made = Divergence()(Dataset.from_list([row(values, values)]))[0]
    assert (made["sentences"], made["shared_sentences"]) == (6, 1.0)
    assert made["teacher_sentences"] == made["student_sentences"] == made["teacher_gap"] == 0


def test_a_sentence_is_of_the_model_that_finds_it_far_likelier():
    given = row([0.9, 0.1, 0.5, 0.5, 0.5, 0.5], [0.1, 0.9, 0.5, 0.55, 0.3, 0.45])
    made = Divergence()(Dataset.from_list([given, row([], [], "")]))
    assert made[0]["teacher_sentences"] == pytest.approx(2 / 6)
    assert made[0]["student_sentences"] == pytest.approx(1 / 6)
    assert made[0]["shared_sentences"] == pytest.approx(3 / 6)
    assert made[1]["teacher_sentences"] is None and made[1]["sentences"] == 0


def test_exchanging_the_models_exchanges_the_sentences():
    given = Dataset.from_list([row([0.9, 0.1, 0.5, 0.8, 0.5, 0.5], [0.1, 0.9, 0.5, 0.55, 0.3, 0.45])])
    one, other = Divergence()(given)[0], Divergence(teacher="student", student="teacher")(given)[0]
    assert one["teacher_sentences"] == other["student_sentences"]
    assert one["teacher_gap"] == -other["teacher_gap"]


def test_a_cut_is_between_words_and_depends_on_the_seed_and_the_text_alone():
    rows = Dataset.from_list([{"prompt": str(n), "completion": TEXT, "model": "m"} for n in range(40)])
    made = Cut().run(rows, Desk(seed=1))
    for one in made:
        assert TEXT.startswith(one["prefix"]) and TEXT[len(one["prefix"])].isspace()
    assert len(set(made["prefix"])) > 5
    assert Cut().run(rows.select(range(5, 9)), Desk(seed=1))["prefix"] == made["prefix"][5:9]
    assert Cut().run(rows, Desk(seed=2))["prefix"] != made["prefix"]
    half = Cut(at_least=0.5, at_most=0.8).run(rows, Desk())
    assert all(0.5 <= len(one) / len(TEXT) <= 0.8 for one in half["prefix"])


def test_what_cannot_be_cut_is_left_out_and_counted():
    desk = Desk()
    rows = Dataset.from_list([{"prompt": "p", "completion": text} for text in ("word", "", "two words")])
    assert Cut().run(rows, desk)["prefix"] == ["two"]
    assert desk.counts.kinds["nowhere to cut"].count == 2
