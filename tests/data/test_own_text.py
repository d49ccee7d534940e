"""The student's own text, read by a teacher with another tokenizer."""

from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from readers import reader as tokenizer

from kdlm.data import DataSection
from kdlm.data.forms import Form
from kdlm.data.own_text import Reader
from kdlm.data.two_readings import PairEncoder
from kdlm.rollouts import Completion, Written, as_row
from kdlm.rollouts.rows import prompt_of, their_prompt_of
from kdlm.signal import IGNORE_INDEX

KINDS = ["tiny", "bytes", "unigram-tiny"]
PAIRS = [*((a, b) for a in KINDS for b in KINDS if a != b), ("spbpe-1k", "tiny"), ("bytes", "spbpe-1k")]
TEXTS = ["def f(x):\n    return x  # naïve 🙂 知", " leading", "a", "é", "👩‍🔬", "x = 1\n\n\n\ty"]


@cache
def reader(ours: str, theirs: str) -> Reader:
    return Reader(tokenizer(ours), tokenizer(theirs))


def ids(kind: str, text: str) -> list[int]:
    return tokenizer(kind)(text, add_special_tokens=False)["input_ids"]


def own(prompt: list[int], answer: list[int], **more: Any) -> dict[str, Any]:
    return {"input_ids": [*prompt, *answer], "labels": [IGNORE_INDEX] * len(prompt) + answer, **more}


def spelt(spelling: Any, tokens: list[int], chunks: np.ndarray, number: int) -> str:
    """What the tokens of a chunk say: nothing where they are its closing, U+FFFD where they are no text."""
    inside = [i for i, chunk in zip(tokens, chunks, strict=True) if chunk == number]
    assert inside
    if all(i in spelling.control for i in inside) and number == chunks.max():
        return ""
    return b"".join(spelling.text([i]) or b"\xff" for i in inside).decode(errors="replace")


def assert_aligned(read: Reader, row: dict[str, Any], seen: dict[str, Any]) -> int:
    count = int(np.max(seen["chunks"], initial=-1)) + 1
    assert count == int(np.max(seen["their_chunks"], initial=-1)) + 1
    for number in range(count):
        ours = spelt(read.spelling, row["input_ids"], seen["chunks"], number)
        theirs = spelt(read.theirs, seen["their_ids"], seen["their_chunks"], number)
        assert ours == theirs or (number == 0 and ours.removeprefix(" ") == theirs.removeprefix(" ")), number
    assert len(seen["chunks"]) == len(row["input_ids"])
    assert len(seen["their_ids"]) == len(seen["their_chunks"]) == len(seen["their_labels"])
    for chunks in (seen["chunks"], seen["their_chunks"]):
        inside = chunks[chunks >= 0]
        assert set(np.diff(inside)) <= {0, 1} and inside[:1].tolist() in ([], [0])
    return count


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
@pytest.mark.parametrize("text", TEXTS)
def test_all_of_a_finished_completion_is_in_chunks(ours: str, theirs: str, text: str) -> None:
    read = reader(ours, theirs)
    row = own(ids(ours, "say: "), [*ids(ours, text), tokenizer(ours).eos_token_id])
    seen = read(row)
    assert assert_aligned(read, row, seen)
    assert (seen["chunks"][len(ids(ours, "say: ")) :] >= 0).all()
    trained = np.asarray(seen["their_labels"]) != IGNORE_INDEX
    assert (seen["their_chunks"][trained] >= 0).all()
    assert seen["their_ids"][-1] == tokenizer(theirs).eos_token_id


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_a_completion_that_was_cut_anywhere_is_read_up_to_its_last_whole_character(ours: str, theirs: str) -> None:
    read, prompt = reader(ours, theirs), ids(ours, "say: ")
    whole = ids(ours, "naïve 🙂 知識")
    for stop in range(len(whole) + 1):
        row = own(prompt, whole[:stop], their_closing=[])
        seen = read(row)
        assert_aligned(read, row, seen)
        said = read.theirs.text([i for i in seen["their_ids"] if i not in read.theirs.control]) or b""
        assert said.decode().rstrip().endswith(read.spelling.text(whole[:stop]).decode(errors="ignore").strip())


@pytest.mark.parametrize("theirs", ["tiny", "unigram-tiny"])
def test_a_prompt_may_end_inside_a_character(theirs: str) -> None:
    read, whole = reader("bytes", theirs), ids("bytes", "a 🙂 = 知 !")
    for cut in range(1, len(whole)):
        row = own(whole[:cut], whole[cut:])
        seen = read(row)
        assert assert_aligned(read, row, seen) or not bytes(whole[cut:])
        said = read.theirs.text([i for i in seen["their_ids"] if i not in read.theirs.control]) or b""
        assert said.decode().strip() == "a 🙂 = 知 !"
        assert seen["chunks"][-1] >= 0


def test_what_is_no_text_is_a_replacement_character_to_the_teacher() -> None:
    read = reader("bytes", "tiny")
    lone = ids("bytes", "é")[:1]  # the first half of a character
    answer = [*ids("bytes", "ab"), *lone, *ids("bytes", "cd"), tokenizer("bytes").eos_token_id]
    row = own(ids("bytes", "p"), answer)
    seen = read(row)
    assert assert_aligned(read, row, seen) >= 4
    assert (seen["chunks"][1:] >= 0).all()
    assert tokenizer("tiny").decode(seen["their_ids"], skip_special_tokens=True) == "pab\ufffdcd"


def test_an_unknown_token_says_no_text() -> None:
    read, ours = reader("unigram-tiny", "tiny"), tokenizer("unigram-tiny")
    row = own(ids("unigram-tiny", "p"), [*ids("unigram-tiny", "x = 1"), ours.unk_token_id, ours.eos_token_id])
    seen = read(row)
    assert assert_aligned(read, row, seen) >= 2
    assert tokenizer("tiny").decode(seen["their_ids"], skip_special_tokens=True).endswith("= 1\ufffd")


def test_a_masked_completion_leaves_the_teacher_its_prompt_alone() -> None:
    read = reader("bytes", "tiny")
    row = own([], ids("bytes", "ab"), their_prompt=[7, 8], their_closing=[])
    seen = read(row | {"labels": [IGNORE_INDEX] * len(row["input_ids"])})
    assert (seen["chunks"] == -1).all() and seen["their_ids"] == [7, 8]
    assert seen["their_labels"] == [IGNORE_INDEX] * 2


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=12), st.text(max_size=30), st.integers(0, 40), st.sampled_from(PAIRS))
def test_any_text_is_read_without_misalignment(prompt: str, answer: str, stop: int, pair: tuple[str, str]) -> None:
    ours, theirs = pair
    read = reader(ours, theirs)
    row = own(ids(ours, f"p{prompt}"), ids(ours, answer)[:stop])
    if len(row["input_ids"]) > 1:
        assert_aligned(read, row, read(row))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 2**31), max_size=30), st.booleans(), st.sampled_from(PAIRS))
def test_whatever_tokens_a_student_draws_are_read_without_misalignment(drawn, ended, pair: tuple[str, str]) -> None:
    """Nearly all of them are in chunks: no text is passed over."""
    ours, theirs = pair
    read = reader(ours, theirs)
    vocabulary = [i for i in range(len(tokenizer(ours))) if i not in read.spelling.control]
    answer = [vocabulary[number % len(vocabulary)] for number in drawn]
    row = own(ids(ours, "p"), [*answer, tokenizer(ours).eos_token_id] if ended else answer)
    seen = read(row)
    assert_aligned(read, row, seen)
    if ended:
        assert (seen["chunks"][len(ids(ours, "p")) :] >= 0).all()


# From the data's row


def encoder(ours: str, theirs: str, form: str, **options: Any) -> PairEncoder:
    columns = {"chat": ["messages"], "completion": ["prompt", "completion"], "prompt": ["prompt"], "text": ["text"]}
    section = DataSection(train=[{"path": "x"}], **{"max_length": 256, **options})
    return PairEncoder(tokenizer(ours), tokenizer(theirs), section, Form(form, {name: name for name in columns[form]}))


CHAT = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello 🙂"},
    {"role": "user", "content": "sum?"},
    {"role": "assistant", "content": "x = 1 + 2"},
]
ROWS = [
    ("chat", {"messages": CHAT}),
    ("completion", {"prompt": "def f(", "completion": "x, y):\n    return x"}),
    ("completion", {"prompt": CHAT[:3], "completion": CHAT[3:]}),
]


def encoded(make: PairEncoder, values: dict[str, Any]) -> dict[str, Any]:
    (found,) = make([("place", values)])
    (one,) = found.sequences
    return {"input_ids": one.ids, "labels": one.labels, "index": 3, **one.beside}


def completed(row: dict[str, Any], answer: list[int], stop: Any = "end", *, masked: bool = False) -> dict[str, Any]:
    prompt = prompt_of(row, 4)
    return as_row(Written(row, prompt, Completion(answer, [0.0] * len(answer), stop, 0)), masked=masked)


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
@pytest.mark.parametrize(("form", "values"), ROWS, ids=["chat", "text pair", "chat pair"])
def test_a_completion_that_says_what_the_data_say_is_read_as_the_data_are(ours, theirs, form, values) -> None:
    row = encoded(encoder(ours, theirs, form), values)
    prompt = prompt_of(row, None)
    labels = [label for label in row["labels"][len(prompt) :] if label != IGNORE_INDEX]
    made = completed(row, labels)
    seen = reader(ours, theirs)(made)
    answer = len(their_prompt_of(row))
    size = len(seen["their_ids"])
    assert seen["their_ids"] == list(row["their_ids"])[:size]
    assert all(label == IGNORE_INDEX for label in row["their_labels"][size:])
    assert seen["their_labels"][answer:] == list(row["their_labels"])[answer:size]
    first = row["chunks"][len(prompt)]  # the data's earlier answers are chunks too
    shifted = np.where(row["chunks"][len(prompt) :] >= 0, row["chunks"][len(prompt) :] - first, -1)
    assert (seen["chunks"][len(prompt) :] == shifted[: len(labels)]).all()
    assert made["index"] == 3


@pytest.mark.parametrize("messages", [True, False])
@pytest.mark.parametrize(("ours", "theirs"), [("bytes", "unigram-tiny"), ("unigram-tiny", "tiny")])
def test_a_prompt_alone_is_rendered_and_ended_as_the_teacher_does(ours: str, theirs: str, messages: bool) -> None:
    teacher = tokenizer(theirs)
    row = encoded(encoder(ours, theirs, "prompt"), {"prompt": CHAT[:1] if messages else "hi"})
    made = completed(row, [*ids(ours, "yes"), tokenizer(ours).eos_token_id])
    seen = reader(ours, theirs)(made)
    rendered = teacher.apply_chat_template(CHAT[:1], add_generation_prompt=True, return_dict=False)
    prompt = rendered if messages else ids(theirs, "hi")
    end = "<|im_end|>" if messages and theirs == "tiny" else teacher.eos_token
    assert seen["their_ids"][: len(prompt)] == prompt
    assert seen["their_ids"][-1] == teacher.convert_tokens_to_ids(end)
    assert seen["chunks"][-1] == seen["their_chunks"][-1] >= 0


@pytest.mark.parametrize(("our_length", "their_length"), [(50, 256), (256, 40)])
def test_where_one_reading_was_cut_the_answer_is_the_last_that_both_have(our_length: int, their_length: int) -> None:
    make = encoder("bytes", "tiny", "chat", max_length=our_length, teacher_max_length=their_length)
    row = encoded(make, {"messages": CHAT})
    prompt, theirs = prompt_of(row, None), their_prompt_of(row)
    for said in (tokenizer("bytes").decode(prompt), tokenizer("tiny").decode(theirs)):
        assert said.endswith("assistant\n") and "hi" in said and "sum" not in said


def test_plain_text_has_one_prompt_for_both() -> None:
    make = encoder("bytes", "tiny", "text")
    row = encoded(make, {"text": "def f(x): return x"})
    made = completed(row, ids("bytes", " is it"), "length")
    assert "their_prompt" not in made and made["their_closing"] == []
    seen = reader("bytes", "tiny")(made)
    assert tokenizer("tiny").decode(seen["their_ids"]) == "def  is it"


def test_chunks_number_the_text_in_order() -> None:
    read = reader("bytes", "unigram-tiny")
    seen = read(own(ids("bytes", "p "), ids("bytes", "one two three")))
    inside = seen["their_chunks"][seen["their_chunks"] >= 0]
    assert all(b - a in (0, 1) for a, b in pairwise(inside.tolist())) and inside[0] == 0
