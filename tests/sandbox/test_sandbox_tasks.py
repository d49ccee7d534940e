import dataclasses
import re
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdlm.sandbox.arithmetic import arithmetic
from kdlm.sandbox.strings import strings
from kdlm.sandbox.tasks import LEVELS, Task, final_answer, generate, verify

FAMILIES = {"arithmetic": arithmetic, "strings": strings}
families = st.sampled_from(list(FAMILIES.values()))
seeds = st.integers(0, 2**32)
levels = st.sampled_from(LEVELS)
ANY = Task("What is 700 + 34?", "", "734", 1, "add")
WORD = Task("Reverse the string abc.", "", "cba", 1, "reverse")


@settings(max_examples=40, deadline=None)
@given(family=families, seed=seeds, level=levels)
def test_a_worked_solution_is_accepted_and_another_answer_refused(family, seed, level):
    for task in family(seed=seed, level=level, n=10):
        assert verify(task, task.completion)
        other = str(int(task.answer) + 1) if task.answer.lstrip("-").isdigit() else task.answer + "a"
        assert not verify(task, f"Answer: {other}")
        assert not verify(task, task.completion + f"\nAnswer: {other}")
        thought = task.completion.rpartition("Answer:")[0]
        assert not verify(task, thought), "a solution cut off before its answer has none"


@settings(max_examples=40, deadline=None)
@given(seed=seeds, level=levels)
def test_every_line_of_worked_arithmetic_is_true(seed, level):
    for task in arithmetic(seed=seed, level=level, n=10):
        assert eval(task.prompt.removeprefix("What is ").removesuffix("?")) == int(task.answer)
        for line in task.completion.splitlines():
            if column := re.match(r"(.+\S) = (\d+), write (\d)", line):
                assert eval(column[1]) == int(column[2]), line
                assert int(column[2]) % 10 == int(column[3]), line


@settings(max_examples=40, deadline=None)
@given(seed=seeds, level=levels)
def test_the_answers_to_string_tasks_are_right(seed, level):
    after = string.ascii_lowercase
    for task in strings(seed=seed, level=level, n=10):
        word = re.search(r"(?:string|letters? of|occur in) (\w+)", task.prompt)[1]
        if task.kind == "reverse":
            expected = "".join(reversed(word))
        elif task.kind == "sort":
            expected = "".join(letter * word.count(letter) for letter in after)
        elif task.kind == "count":
            expected = str(word.count(re.search(r"does (\w) occur", task.prompt)[1]))
        else:
            shift = int(re.search(r"by (\d+) places", task.prompt)[1])
            expected = word.translate(str.maketrans(after, after[shift:] + after[:shift]))
        assert task.answer == expected, task.prompt


@pytest.mark.parametrize(
    "text",
    [
        "Answer: 734",
        "700 + 34:\n= 734\nanswer: **734**.",
        "The final answer is 734.",
        "so the answer is: $734$",
        r"\boxed{734}",
        r"Answer: \boxed{734}",
        "734",
        "Answer: 0734",
        "Answer: +734",
        "Answer: 1\nno, Answer: 734",
        "Answer: 734<|im_end|>",
        "Answer: 734<eos>garbage",
        "700 + 34\n#### 734",
        "#### Step 1\nadd\n#### Step 2\nAnswer: 734",
    ],
)
def test_a_right_answer_is_found_in_whatever_dress(text):
    assert verify(ANY, text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Answer:",
        "Answer: 7340",
        "Answer: -734",
        "Answer: 734 or 735",
        "Answer: 734.5",
        "Answer: 734\nAnswer: 735",
        "700 + 34:\n= 734",
        "Answer: 700 + 34",
        "Answer: " + "9" * 5_000,
    ],
)
def test_whatever_is_not_the_answer_is_refused(text):
    assert not verify(ANY, text)


def test_large_and_negative_numbers_are_compared_by_value():
    assert verify(dataclasses.replace(ANY, answer="-12345"), "Answer: \u221212,345")
    assert not verify(dataclasses.replace(ANY, answer="12345"), "Answer: 1,2345")
    assert verify(dataclasses.replace(ANY, answer="0"), "Answer: -0")


@pytest.mark.parametrize(
    "text, answer",
    [
        (r"so \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"so \boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"f(x) = { so \boxed{a} } or \boxed{", "a"),
        (r"\boxed{a} then \boxed{\boxed{b}} and }", "b"),
        ("Answer: a\n#### Conclusion", "a"),
    ],
)
def test_boxes_close_where_their_braces_match_and_headings_are_no_answers(text, answer):
    assert final_answer(text) == answer


def test_strings_are_compared_letter_by_letter():
    assert verify(WORD, 'Answer: "cba"')
    assert not verify(WORD, "Answer: CBA")
    assert not verify(WORD, "Answer: c b a")


@given(st.text())
def test_any_text_has_an_answer_or_none(text):
    assert final_answer(text) is None or isinstance(final_answer(text), str)
    assert isinstance(verify(ANY, text), bool)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_levels_grow_harder(family):
    lengths = []
    for level in LEVELS:
        tasks = family(seed=0, level=level, n=300)
        assert {task.level for task in tasks} == {level}
        lengths.append(sum(len(task.completion) for task in tasks) / len(tasks))
    assert lengths == sorted(lengths)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_train_and_eval_never_meet_whatever_the_seeds(family):
    for level in LEVELS:
        train = {task.prompt for seed in range(3) for task in family(seed=seed, level=level, n=300)}
        held_out = {task.prompt for seed in range(3) for task in family(seed=seed, level=level, n=60, split="eval")}
        assert train and held_out and train.isdisjoint(held_out)


@settings(max_examples=20, deadline=None)
@given(family=families, seed=seeds, level=levels)
def test_the_same_arguments_give_the_same_different_tasks(family, seed, level):
    tasks = family(seed=seed, level=level, n=20)
    assert tasks == family(seed=seed, level=level, n=20)
    assert len({task.prompt for task in tasks}) == 20
    assert tasks[:5] == family(seed=seed, level=level, n=5), "asking for more does not change the first"


def test_impossible_wishes_are_refused_in_words():
    with pytest.raises(ValueError, match="level 9 does not exist"):
        arithmetic(seed=0, level=9, n=1)
    with pytest.raises(ValueError, match=r"gave \d different train problems, 5 were asked for"):
        generate(lambda generator, level: ANY, seed=0, level=1, n=5)
