"""YAML is read by the core schema of version 1.2, and every value knows its line."""

import math
from pathlib import Path

import pytest

from kdlm.yaml_document import Document, RecipeError, dump


def read(text: str):
    return Document(text, "r.yaml").data


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("2.0e-3", 0.002),
        ("5E+3", 5000.0),
        (".5", 0.5),
        ("-1.", -1.0),
        (".inf", math.inf),
        ("-.inf", -math.inf),
        ("12", 12),
        ("-0x1f", "-0x1f"),
        ("0x1f", 31),
        ("0o17", 15),
        ("007", 7),
        ("1_000", "1_000"),
        ("1:30", "1:30"),
        ("no", "no"),
        ("on", "on"),
        ("yes", "yes"),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("''", ""),
        ("'1'", "1"),
        ("2020-01-01", "2020-01-01"),
    ],
)
def test_plain_words_mean_what_yaml_1_2_says(text, value):
    got = read(f"a: {text}")["a"]
    assert got == value
    assert type(got) is type(value)


def test_an_empty_value_is_null():
    assert read("a:\nb: 1") == {"a": None, "b": 1}


def test_nan_is_a_number():
    assert math.isnan(read("a: .nan")["a"])


def test_an_alias_stands_for_its_anchor_and_changes_nothing_else():
    assert read("a: &x {b: 1}\nc: *x\nd: [*x]") == {"a": {"b": 1}, "c": {"b": 1}, "d": [{"b": 1}]}


def test_nested_aliases_share_their_values_instead_of_growing():
    lines = ["a0: &a0 [1, 1]"] + [f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 60)]
    data = read("\n".join(lines))
    assert data["a59"][0] is data["a59"][1]


@pytest.mark.parametrize(
    ("text", "path", "line"),
    [
        ("a: &x {b: *x}", ("a", "b"), 1),
        ("a: &x\n  - 1\n  - *x", ("a", 1), 1),
        ("a: &x\n  b:\n    c: *x", ("a", "b", "c"), 3),
    ],
)
def test_a_value_that_contains_itself_is_refused(text, path, line):
    document = Document(text, "r.yaml")
    (problem,) = document.problems
    assert document.lost == {path}
    assert "cyclic alias" in problem.message
    assert problem.line == line


def test_a_duplicate_key_names_both_lines_and_the_first_value_stays():
    document = Document("a: 1\nb: 2\na: 3", "r.yaml")
    assert document.data == {"a": 1, "b": 2}
    assert str(document.problems[0]) == "r.yaml:3: a: duplicate key, first set on line 1"


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.system ['true']", "!mine {a: 1}", "!!timestamp 2020-01-01"])
def test_tags_that_build_objects_are_refused_and_build_nothing(tag):
    document = Document(f"a: {tag}", "r.yaml")
    assert document.data == {"a": None}
    assert "is not allowed" in str(document.problems[0])


def test_a_tag_that_its_value_does_not_fit_is_named():
    assert "is not of the type" in str(Document("a: !!int x", "r.yaml").problems[0])


@pytest.mark.parametrize(
    ("text", "place", "words"),
    [
        ("a: b: c", "r.yaml:1:5", "quote a value that holds ': '"),
        ("a:\n\t- b", "r.yaml:2:1", "indent with spaces"),
        ("a: [1, 2\nb: 3", "r.yaml:2:2", "a bracket is not closed"),
        ("a: {x: 1", "r.yaml:1:9", "a brace is not closed"),
        ("a: 'x", "r.yaml:1:6", "a quote is not closed"),
        ("- a\nb: 1", "r.yaml:2:1", "the indentation does not match"),
        ("a: *q", "r.yaml:1:4", "there is no anchor of this name"),
        ("a: 1\n---\nb: 2", "r.yaml:2:1", "keep one document"),
    ],
)
def test_a_syntax_error_has_line_column_and_what_to_mend(text, place, words):
    with pytest.raises(RecipeError) as caught:
        Document(text, "r.yaml")
    (problem,) = caught.value.problems
    assert problem.place == place
    assert words in problem.message


@pytest.mark.parametrize("text", ["a: \x00", "[" * 500])
def test_what_is_no_yaml_at_all_is_one_problem(text):
    with pytest.raises(RecipeError) as caught:
        Document(text, "r.yaml")
    assert len(caught.value.problems) == 1


def test_a_file_that_cannot_be_read_is_one_problem(tmp_path: Path):
    latin = tmp_path / "latin.yaml"
    latin.write_bytes(b"a: \xe9")
    empty = tmp_path / "empty.yaml"
    empty.write_text("# nothing yet\n")
    expected = {
        tmp_path / "none.yaml": "No such file",
        tmp_path: "Is a directory",
        latin: "not UTF-8 text (byte 3)",
        empty: "the file is empty",
    }
    for path, words in expected.items():
        with pytest.raises(RecipeError, match=words.replace("(", r"\(").replace(")", r"\)")) as caught:
            Document.read(path)
        assert str(caught.value).startswith(f"{path}: ")


def test_lines_are_those_of_the_key_or_the_list_item():
    document = Document("a:\n  b: 1\n  c:\n    - x\n    -\n      d: 2\ne: [1,\n 2]", "r.yaml")
    lines = {(): 1, ("a",): 1, ("a", "c"): 3, ("a", "c", 1): 6, ("a", "c", 1, "d"): 6, ("e", 1): 8, ("a", "z", 3): 1}
    assert {path: document.line(path) for path in lines} == lines


def test_what_is_dumped_is_read_back_unchanged():
    words = [
        "no",
        "on",
        "1e-3",
        "0o17",
        "1:30",
        "2020-01-01",
        "null",
        "~",
        "",
        "true",
        "a: b",
        "- x",
        "#",
        "'",
        "ü",
        "007",
    ]
    numbers = [1, -2, 1e-5, 2e20, 0.1, math.inf, True, None]
    data = {"words": words, "numbers": numbers, "nested": {word or "empty": [{}] for word in words}, "lines": "a\nb\n"}
    assert read(dump(data)) == data
