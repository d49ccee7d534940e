"""Contexts: the teacher's prompt is longer, the answer's tokens are the same, and every kept position has its place."""

import json

import pytest
import torch
from loopback import source
from pydantic import ValidationError

from kdlm.data import Collator, ContextCollator, ContextSection, DataSection, Reprompt
from kdlm.losses import kept_rows
from kdlm.signal import IGNORE_INDEX
from kdlm.teachers import LocalTeacher
from kdlm.teachers.local import own_reading

ROWS = [
    {"prompt": "what is two and three?", "completion": " five", "hint": "it is five"},
    {"prompt": "what is seven minus four?", "completion": " three, says the fox", "hint": None},
    {"prompt": "the ", "completion": "dog", "hint": "a dog, and not a fox that jumps over it"},
]
MAPPED = {"columns": {"prompt": "prompt", "completion": "completion", "context": "hint"}}
TEMPLATE = {"template": "{context}\n{prompt}"}


def loaded(load, jsonl, tokenizer, rows=ROWS, template=TEMPLATE, source=MAPPED, **options):
    return load([{"path": jsonl(rows), **source}], tokenizer, context=template, **options)


def places_of(batch):
    """Return, for each kept position, the token before it and after it in both readings."""
    rows = kept_rows(batch["labels"])
    theirs, there = own_reading(batch, rows)
    ours, other = batch["input_ids"].flatten(), theirs["input_ids"].flatten()
    return ours[rows.index], other[there.index], ours[rows.index + 1], other[there.index + 1], theirs


@pytest.mark.parametrize("packing", ["none", "padding_free"])
def test_every_kept_position_follows_the_same_answer_in_both_readings(load, jsonl, tokenizer, packing):
    data = loaded(load, jsonl, tokenizer, packing=packing)
    batch = data.collator([data.train[number] for number in range(3)])
    assert batch["informed"].tolist() == [True, False, True]
    before, theirs_before, after, theirs_after, theirs = places_of(batch)
    assert torch.equal(after, theirs_after)
    assert (
        len(after) == (batch["labels"][:, 1:] != IGNORE_INDEX).sum() == (theirs["labels"][:, 1:] != IGNORE_INDEX).sum()
    )
    within = before == theirs_before  # the last token of a prompt is the template's last in the other
    assert within.sum() >= len(within) - 1
    assert torch.equal(kept_rows(theirs["labels"]).labels, kept_rows(batch["labels"]).labels)


def test_the_teachers_prompt_is_the_template_and_the_students_is_its_own(load, jsonl, tokenizer):
    data = loaded(load, jsonl, tokenizer)
    batch = data.collator([data.train[0]])
    whole = tokenizer.decode(batch["theirs"]["input_ids"][0])
    assert whole == "it is five\nwhat is two and three? five<|im_end|>"
    assert tokenizer.decode(batch["input_ids"][0]) == "what is two and three? five<|im_end|>"


def test_rows_without_a_context_make_the_batch_that_they_make_without_any(load, jsonl, tokenizer):
    data = loaded(load, jsonl, tokenizer, rows=[{**row, "hint": ""} for row in ROWS])
    rows = [data.train[number] for number in range(3)]
    batch, plain = data.collator(rows), Collator(tokenizer.pad_token_id)(rows)
    assert "theirs" not in batch and not batch["informed"].any()
    assert all(torch.equal(batch[name], plain[name]) for name in ("input_ids", "labels", "attention_mask"))


@pytest.mark.parametrize("packing", ["none", "padding_free"])
def test_several_contexts_and_a_bad_one_are_readings_of_their_own(load, jsonl, tokenizer, packing):
    rows = [
        {**row, "hints": ["a fox", "", row["prompt"]], "mistake": bad}
        for row, bad in zip(ROWS, ["six", "", None], strict=True)
    ]
    named = {"contexts": "hints", "bad_context": "mistake"}
    data = loaded(load, jsonl, tokenizer, rows=rows, source={"columns": MAPPED["columns"] | named}, packing=packing)
    batch = data.collator([data.train[number] for number in range(3)])
    plain = loaded(load, jsonl, tokenizer, packing=packing)
    assert torch.equal(
        batch["theirs"]["input_ids"], plain.collator([plain.train[n] for n in range(3)])["theirs"]["input_ids"]
    )
    assert len(batch["others"]) == 3 and batch["misguided"].tolist() == [True, False, False]
    for reading in (*batch["others"], batch["misled"]):
        *_, after, theirs_after, _ = places_of(batch | {"theirs": reading})
        assert torch.equal(after, theirs_after)
    texts = [tokenizer.decode(reading["input_ids"].flatten()) for reading in (*batch["others"], batch["misled"])]
    assert [text.count("a fox\n") for text in texts] == [3, 0, 0, 0] and texts[3].count("six\n") == 1


def test_a_long_context_is_cut_and_the_answer_never(load, jsonl, tokenizer):
    short = loaded(load, jsonl, tokenizer, template={**TEMPLATE, "max_tokens": 2})
    batch = short.collator([short.train[2]])
    told = batch["theirs"]["input_ids"][0]
    assert tokenizer.decode(told).endswith("the dog<|im_end|>")
    assert len(told) == 2 + len(tokenizer("\nthe ")["input_ids"]) + len(tokenizer("dog")["input_ids"]) + 1


def test_braces_in_prompt_and_context_are_text():
    class Letters:
        def __call__(self, text, **_):
            return {"input_ids": [ord(letter) for letter in text]}

    reprompt = Reprompt(Letters(), ContextSection(template="<{context}> {prompt}"))
    reprompt.__dict__["_leading"] = []
    ids = reprompt(json.dumps({"prompt": "{context} {x}"}), "{prompt}")
    assert "".join(map(chr, ids)) == "<{prompt}> {context} {x}"


def test_a_conversation_is_told_in_the_users_last_message_and_trained_on_its_last_answer(load, jsonl, tokenizer):
    messages = [
        {"role": "user", "content": "the dog?"},
        {"role": "assistant", "content": "lazy"},
        {"role": "user", "content": "the fox?"},
        {"role": "assistant", "content": "quick"},
    ]
    rows = [{"messages": messages, "hint": "quick, brown"}, {"messages": messages, "hint": None}]
    source = {"columns": {"messages": "messages", "context": "hint"}}
    data = loaded(load, jsonl, tokenizer, rows=rows, source=source)
    batch = data.collator([data.train[0], data.train[1]])
    said = tokenizer.decode(batch["theirs"]["input_ids"][0])
    assert said.count("quick, brown\nthe fox?") == 1 and said.count("the dog?") == 1
    told, untold = (tokenizer.decode(labels[labels != IGNORE_INDEX]) for labels in batch["labels"])
    assert told == "quick<|im_end|>" and untold == "lazy<|im_end|>quick<|im_end|>"
    *_, after, theirs_after, _ = places_of(batch)
    assert torch.equal(after, theirs_after)


def test_a_prompt_of_ones_own_comes_before_a_context():
    rows = [{"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8], "context_prompt": [1, 2, 3], "context": "no"}]
    batch = ContextCollator(Collator(0), Reprompt(None, ContextSection()))(rows)
    assert batch["theirs"]["input_ids"].tolist() == [[1, 2, 3, 7, 8]]
    assert batch["theirs"]["at"].tolist() == [[-1, 2, 3, 4]]


@pytest.mark.parametrize("template", ["{prompt}", "{context}", "{prompt} {context} {context}"])
def test_a_template_without_its_two_places_is_refused(template):
    with pytest.raises(ValidationError, match="in it, expected once"):
        ContextSection(template=template)


def test_packed_rows_have_no_prompt_to_write_into():
    with pytest.raises(ValidationError, match="context: packed rows"):
        DataSection(train=[{"path": "a"}], context={}, packing="pack")


def test_plain_text_asks_nothing(load, jsonl, tokenizer):
    with pytest.raises(ValueError, match="plain text has no prompt"):
        load([{"path": jsonl([{"text": "the fox"}])}], tokenizer, context={})


TALK = [
    {"role": "user", "content": "the dog?"},
    {"role": "assistant", "content": "lazy"},
    {"role": "user", "content": "the fox?"},
    {"role": "assistant", "content": "quick"},
]


def test_a_conversation_cut_before_its_last_answer_is_not_used(load, jsonl, tokenizer):
    """What is asked is the last question: to score an earlier answer after it would show the teacher that answer."""
    rows = [{"messages": TALK, "hint": "it is quick"}, {"messages": TALK[:2], "hint": "it is lazy"}]
    source = {"columns": {"messages": "messages", "context": "hint"}}
    whole = loaded(load, jsonl, tokenizer, rows=rows, source=source).train[0]
    starts = [n for n in range(1, len(whole["labels"])) if whole["labels"][n - 1] == -100 != whole["labels"][n]]
    kept = loaded(load, jsonl, tokenizer, rows=rows, source=source, max_length=starts[1] + 1)
    cut = loaded(load, jsonl, tokenizer, rows=rows, source=source, max_length=starts[1])
    assert (len(kept.train), len(cut.train)) == (2, 1)


def test_of_a_completion_of_several_messages_the_teacher_reads_all_before_the_last_answer(load, jsonl, tokenizer):
    rows = [{"prompt": TALK[:1], "completion": TALK[1:], "hint": "it is quick"}]
    data = loaded(load, jsonl, tokenizer, rows=rows)
    batch = data.collator([data.train[0]])
    same = loaded(
        load,
        jsonl,
        tokenizer,
        rows=[{"messages": TALK, "hint": "it is quick"}],
        source={"columns": {"messages": "messages", "context": "hint"}},
    )
    assert torch.equal(batch["theirs"]["input_ids"], same.collator([same.train[0]])["theirs"]["input_ids"])


@pytest.mark.parametrize("layout", ["padded", "padding_free"])
def test_a_teacher_that_is_told_more_than_it_can_read_says_so(layout):
    student = source("code-student-tiny").load()
    most = student.config.max_position_embeddings
    row = {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]}
    for size, fits in ((most - 2, True), (most - 1, False)):
        rows = [{**row, "context_prompt": [9] * size}, row]
        batch = ContextCollator(Collator(0, layout=layout), Reprompt(None, ContextSection()))(rows)
        kept = kept_rows(batch["labels"])
        if fits:
            assert len(LocalTeacher(student)(batch, kept).hidden) == 4
        else:
            with pytest.raises(ValueError, match=rf"would read {most + 1} tokens.* lower context.max_tokens"):
                LocalTeacher(student)(batch, kept)


def test_a_prompt_that_is_trained_on_has_no_place_for_a_context():
    with pytest.raises(ValidationError, match="which loss_on: all trains on"):
        DataSection(train=[{"path": "a"}], context={}, loss_on="all")
