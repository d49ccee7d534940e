"""The language of a text is told where there is enough of it; what is not wanted leaves."""

import sys

import pytest
from datasets import Dataset

from kdlm.curation import Desk, Language

ENGLISH = [
    "Natalia sold clips to 48 of her friends in April, and half as many in May. How many did she sell altogether?"
]
GERMAN = ["Natalia verkaufte im April Klammern an 48 Freunde und im Mai halb so viele. Wie viele hat sie verkauft?"]
CHINESE = ["小明有三个苹果他又买了五个请问他现在一共有多少个苹果"]
CODE = [
    "def f(x):\n    for i in range(10):\n        x[i] = x[i-1] + 2*i\n    return x\n\nprint(f([0]*10))",
    "```python\nimport os\n\nclass Reader:\n    def __init__(self, path):\n        self.path = path\n```",
]
SHORT = ["12 + 35 = 47", "ok", "$\\frac{1}{2} + x^2$", "", None]


def rows_of(*texts: str | None) -> Dataset:
    return Dataset.from_dict({"prompt": list(texts), "number": list(range(len(texts)))})


def test_english_german_and_chinese_are_told_apart_and_code_and_short_texts_are_not_decided():
    rows = Language()(rows_of(*ENGLISH, *GERMAN, *CHINESE, *CODE, *SHORT))
    assert rows["language"] == ["en", "de", "zh", *[None] * 7]


def test_what_is_not_wanted_leaves_and_is_counted():
    rows, desk = rows_of(*ENGLISH, *GERMAN, *CHINESE, *SHORT[:1]), Desk()
    kept = Language(keep=["en"]).run(rows, desk)
    assert kept["number"] == [0, 3]
    assert {kind: found.examples for kind, found in desk.counts.kinds.items()} == {
        "in de": ["row 1"],
        "in zh": ["row 2"],
    }
    assert Language(keep=["en"])(kept).to_list() == kept.to_list()
    assert Language(keep=["en", "zh"], undecided="drop")(rows)["number"] == [0, 2]


def test_code_and_formulas_inside_a_text_do_not_count():
    text = f"{GERMAN[0]}\n```\nfor the first of all the names in this list, do the next thing and the other\n```\n"
    assert Language()(rows_of(text))["language"] == ["de"]


def test_messages_are_read():
    assert Language()(rows_of(f'[{{"role": "user", "content": "{GERMAN[0]}"}}]'))["language"] == ["de"]


def test_a_language_that_there_is_not_is_named():
    with pytest.raises(ValueError, match=r"no language 'english'; there are: .*, en, "):
        Language(keep=["english"])(rows_of(*ENGLISH))


def test_without_the_language_library_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "py3langid.langid", None)
    with pytest.raises(ValueError, match=r"pip install 'kdlm\[curate\]'"):
        Language()(rows_of(*ENGLISH))
