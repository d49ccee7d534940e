"""Of rows whose texts are the same, or nearly, one stays: each that leaves is like one that stays, no other leaves."""

import random
import string
import sys

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as some

from kdlm.curation import Deduplicate, Desk
from kdlm.curation.words import ngrams

VOCABULARY = ["".join(random.Random(seed).choices(string.ascii_lowercase, k=6)) for seed in range(400)]


def prompts(count: int) -> list[str]:
    drawn = random.Random(0)
    return [" ".join(drawn.choices(VOCABULARY, k=40)) for _ in range(count)]


def changed(text: str) -> str:
    """Return a text whose last word is another: 35 of the 37 shingles of both are shared."""
    return " ".join([*text.split()[:-1], "zebra"])


def rows_of(texts: list[str]) -> Dataset:
    return Dataset.from_dict({"prompt": texts, "score": [float(number) for number in range(len(texts))]})


def similarity(first: str, second: str) -> float:
    ours, theirs = set(ngrams(first, 5)), set(ngrams(second, 5))
    return len(ours & theirs) / len(ours | theirs)


def test_planted_duplicates_leave_and_nothing_else():
    texts = prompts(200)
    same, near = [f"  {text.upper()}." for text in texts[:20]], [changed(text) for text in texts[20:40]]
    desk = Desk()
    kept = Deduplicate().run(rows_of([*texts, *same, *near]), desk)
    assert kept["prompt"] == texts
    assert kept.column_names == ["prompt", "score"]
    assert {kind: found.count for kind, found in desk.counts.kinds.items()} == {
        "the same text": 20,
        "nearly the same text": 20,
    }
    assert desk.counts.kinds["the same text"].examples[0] == "row 200 as row 0"
    assert desk.counts.kinds["nearly the same text"].examples[0] == "row 220 as row 20, similarity 0.95"


@settings(deadline=None, max_examples=30)
@given(some.lists(some.lists(some.sampled_from("abcd"), min_size=6, max_size=9).map(" ".join), min_size=1, max_size=12))
def test_every_row_that_leaves_is_like_one_that_stays(texts):
    kept = Deduplicate(near=0.5)(rows_of(texts))["prompt"]
    assert all(any(text == other or similarity(text, other) >= 0.5 for other in kept) for text in texts)
    assert Deduplicate(near=0.5)(rows_of(kept))["prompt"] == kept


def test_candidates_of_the_bands_that_are_not_alike_stay():
    texts = [changed(text) for text in prompts(30)] + prompts(30)
    assert similarity(texts[0], texts[30]) < 0.95
    assert len(Deduplicate(near=0.95)(rows_of(texts))) == 60


def test_without_near_only_the_same_text_leaves():
    texts = [*prompts(5), changed(prompts(1)[0]), prompts(1)[0].title()]
    assert Deduplicate(near=None)(rows_of(texts))["prompt"] == texts[:6]


def test_problems_with_other_numbers_are_others():
    text = " ".join(prompts(1)[0].split()[:-2])
    rows = rows_of([f"{text} 17 apples", f"{text} 18 apples", f"{text} 17 pears"])
    assert Deduplicate()(rows)["prompt"] == rows["prompt"][:2]
    assert len(Deduplicate(same_numbers=False)(rows)) == 1


@pytest.mark.parametrize("pair", [("3 + 5", "3 - 5"), ("(2 + 3) * 4", "2 + (3 * 4)"), ("a b c", "a b d")])
def test_short_texts_are_compared_sign_by_sign(pair):
    assert len(Deduplicate()(rows_of(list(pair)))) == 2
    assert len(Deduplicate()(rows_of([pair[0], f" {pair[0].upper()} ?"]))) == 1


def test_the_best_of_a_cluster_stays_in_its_place():
    texts = prompts(3)
    rows = rows_of([texts[0], texts[1], changed(texts[0]), texts[2]])
    assert Deduplicate(order="highest", by="score")(rows)["score"] == [1.0, 2.0, 3.0]
    assert Deduplicate(order="lowest", by="score")(rows)["score"] == [0.0, 1.0, 3.0]


def test_the_order_of_rows_without_duplicates_changes_nothing_but_itself():
    texts = prompts(50)
    assert Deduplicate()(rows_of(texts[::-1]))["prompt"] == texts[::-1]


def test_several_columns_are_one_text_and_messages_are_read():
    prompt = '[{"role": "user", "content": "What is\\n2 + 3?"}]'
    rows = Dataset.from_dict({"prompt": [prompt, "what is 2 + 3", prompt], "completion": ["5", "5", "6"]})
    assert len(Deduplicate()(rows)) == 1
    assert len(Deduplicate(columns=["prompt", "completion"])(rows)) == 2


def test_without_the_library_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasketch", None)
    with pytest.raises(ValueError, match=r"pip install 'kdlm\[curate\]', or say near: null"):
        Deduplicate()(rows_of(prompts(2)))
    assert len(Deduplicate(near=None)(rows_of(prompts(2)))) == 2
