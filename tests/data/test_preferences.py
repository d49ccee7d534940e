"""Preferences: two completions of a prompt stay one row, become two sequences of a batch, are cut each for itself."""

import json

import numpy as np
import pytest
import torch

from kdlm.data import Collator, Source
from kdlm.data.forms import recognise
from kdlm.inspection import _apart
from kdlm.matching import check_sides
from kdlm.methods import LogitKD
from kdlm.rollouts import prompt_of

ROWS = [
    {"prompt": "what is two", "chosen": " and three?", "rejected": " and"},
    {"prompt": "the ", "chosen": "fox", "rejected": "lazy dog and the whole world"},
    {"prompt": "def st", "chosen": "ep(self", "rejected": "ep"},
]


def sides_of(row):
    stop = int(row["seq_lengths"][0])
    return [
        (row["input_ids"][part].tolist(), row["labels"][part].tolist()) for part in (slice(stop), slice(stop, None))
    ]


def test_each_side_is_the_sequence_that_it_would_be_alone(tokenizer, jsonl, load):
    rows = load(jsonl(ROWS), tokenizer).train
    assert len(rows) == len(ROWS)
    for side, name in enumerate(("chosen", "rejected")):
        alone = [{"prompt": row["prompt"], "completion": row[name]} for row in ROWS]
        for row, one in zip(rows, load(jsonl(alone, f"{name}.jsonl"), tokenizer).train, strict=True):
            assert sides_of(row)[side] == (one["input_ids"].tolist(), one["labels"].tolist())
            assert row["rejected"].tolist() == [0, 1]
            assert row["length"] == row["seq_lengths"].sum()


def test_the_sides_have_one_prompt_and_are_looked_at_one_by_one(tokenizer, jsonl, load):
    """The prompt is what `evaluation.generations` has a student complete; the sides are what `kdlm report` shows."""
    alone = load(jsonl([{"prompt": row["prompt"]} for row in ROWS], "prompts.jsonl"), tokenizer).train
    for number, row in enumerate(load(jsonl(ROWS), tokenizer).train):
        assert prompt_of(row, None) == alone[number]["input_ids"].tolist()
        apart = list(_apart(row))
        assert [(one["input_ids"].tolist(), one["labels"].tolist()) for one in apart] == sides_of(row)
        assert [int(one["index"]) for one in apart] == [number] * 2


@pytest.mark.parametrize("streaming", [False, True])
def test_preferences_beside_other_rows_are_refused_with_both_sources(tokenizer, jsonl, load, streaming):
    sources = [jsonl(ROWS), jsonl([{"prompt": "a", "completion": "b"}], "plain.jsonl")]
    for train in (sources, sources[::-1]):
        with pytest.raises(ValueError, match=r"data: '.*' holds preferences and '.*plain\.jsonl' does not"):
            load([{"path": path} for path in train], tokenizer, streaming=streaming)


def test_sides_may_be_messages(chat_tokenizer, jsonl, load):
    prompt = [{"role": "user", "content": "what is two and three?"}]
    asked = {"prompt": json.dumps(prompt), "chosen": "five", "rejected": [{"role": "assistant", "content": "four"}]}
    (row,) = load(jsonl([asked]), chat_tokenizer).train
    for (ids, _), answer in zip(sides_of(row), ("five", "four"), strict=True):
        messages = [*prompt, {"role": "assistant", "content": answer}]
        assert ids == chat_tokenizer.apply_chat_template(messages, return_dict=False)


@pytest.mark.parametrize("layout", ["padded", "padding_free"])
def test_a_batch_has_two_sequences_of_every_row_and_says_which_is_which(tokenizer, jsonl, load, layout):
    rows = [load(jsonl(ROWS), tokenizer).train[i] for i in range(3)]
    loose = [{"input_ids": ids, "labels": labels} for row in rows for ids, labels in sides_of(row)]
    batch, plain = Collator(0, layout)(rows), Collator(0, layout)(loose)
    assert all(torch.equal(batch[name], plain[name]) for name in plain)
    assert batch["rejected"].tolist() == [False, True] * 3
    assert batch["index"].tolist() == [0, 0, 1, 1, 2, 2]
    assert len(batch["domain"]) == 6


def test_a_side_that_is_too_long_is_cut_or_takes_the_other_with_it(tokenizer, jsonl, load):
    path = jsonl(ROWS)
    whole = load(path, tokenizer).train
    size = max(int(row["seq_lengths"].max()) for row in whole)
    cut = load(path, tokenizer, max_length=size - 1)
    lengths = [np.minimum(row["seq_lengths"], size - 1).tolist() for row in whole]
    assert [row["seq_lengths"].tolist() for row in cut.train] == lengths
    assert cut.report.train[0].truncated == 1
    dropped = load(path, tokenizer, max_length=size - 1, truncation="drop")
    assert len(dropped.train) == 2
    assert dropped.report.train[0].unused["too long"].examples[0].partition(": ")[2].startswith("rejected: ")


@pytest.mark.parametrize(
    ("bad", "reason", "said"),
    [
        ({"chosen": ""}, "empty", "chosen: completion is empty"),
        ({"rejected": None}, "empty", "rejected: completion is empty"),
        ({"rejected": 3}, "malformed", "rejected: completion is int"),
        ({"prompt": None}, "malformed", "chosen: prompt is missing"),
        ({"rejected": [{"role": "assistant", "content": "dog"}]}, "malformed", "one is text and one is messages"),
    ],
)
def test_a_row_with_one_bad_side_is_not_used_and_is_counted(tokenizer, jsonl, load, bad, reason, said):
    data = load(jsonl([*ROWS, ROWS[0] | bad]), tokenizer)
    assert len(data.train) == 3
    (example,) = data.report.train[0].unused[reason].examples
    assert said in example


def test_the_prompt_is_not_said_again_in_a_side(chat_tokenizer, jsonl, load):
    chat = [{"role": "user", "content": "two?"}, {"role": "assistant", "content": "2"}]
    with pytest.raises(ValueError, match="chosen does not begin with an assistant turn"):
        load(jsonl([{"prompt": "two?", "chosen": chat, "rejected": chat}]), chat_tokenizer)


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"packing": "pack"}, "packing: the sides of a preference stay together"),
        ({"context": {}}, "context: nobody is told more"),
        ({"loss_on": "all"}, "loss_on: all does not fit preference data"),
    ],
)
def test_what_does_not_fit_preferences_is_refused_by_its_key(tokenizer, jsonl, load, section, said):
    with pytest.raises(ValueError, match=said):
        load(jsonl(ROWS), tokenizer, **section)


def test_conversations_come_first_and_a_mapping_decides():
    columns = ["prompt", "messages", "chosen", "rejected"]
    assert recognise(Source(path="x"), columns).name == "chat"
    mapped = Source.model_validate({"path": "x", "columns": {"chosen": "chosen"}})
    assert recognise(mapped, columns).name == "preference"
    alone = Source.model_validate({"path": "x", "columns": {"completion": "chosen"}})
    answers = {"prompt": "prompt", "chosen": "completion", "rejected": "answer"}
    renamed = Source.model_validate({"path": "x", "columns": answers})
    assert recognise(renamed, ["prompt", "completion", "answer"]).name == "preference"
    assert recognise(alone, ["prompt", "chosen", "rejected"]).name == "completion"


def test_a_stream_of_preferences_has_the_rows_of_stored_ones(tokenizer, jsonl, load):
    path = jsonl(ROWS)
    stored = load(path, tokenizer).train
    stream = list(load(path, tokenizer, streaming=True, shuffle_buffer=0).train)
    assert [list(row["input_ids"]) for row in stream] == [row["input_ids"].tolist() for row in stored]
    assert all(row["rejected"] == [0, 1] for row in stream)


def test_a_method_that_wants_no_preferences_refuses_them(tokenizer, jsonl, load):
    with pytest.raises(ValueError, match="LogitKD: the data's rows are preferences"):
        check_sides(LogitKD(), load(jsonl(ROWS), tokenizer).train)
