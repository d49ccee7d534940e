"""Prompts, completions and plain text become sequences; what is too long is cut, dropped or split as asked."""

import numpy as np
import pytest
from tokenizers.processors import TemplateProcessing

PAIRS = [("what is two", " and three?"), ("def st", "ep(self"), ("the ", "fox"), ("a\n", "\nb"), ("", "the answer")]


@pytest.mark.parametrize(("prompt", "completion"), PAIRS)
def test_a_prompt_has_the_tokens_it_has_alone_and_the_rest_is_trained_on(tokenizer, jsonl, load, prompt, completion):
    (row,) = load(jsonl([{"prompt": prompt, "completion": completion}]), tokenizer).train
    alone = tokenizer(prompt)["input_ids"]
    ids = row["input_ids"].tolist()
    assert ids[: len(alone)] == alone
    assert tokenizer.decode(ids) == f"{prompt}{completion}<|im_end|>"
    first = max(len(alone), 1)
    assert row["labels"].tolist() == [-100] * first + ids[first:]


def test_the_end_token_is_appended_once(tokenizer, jsonl, load):
    rows = [{"prompt": "the ", "completion": "fox"}, {"prompt": "the ", "completion": "fox<|im_end|>"}]
    one, other = load(jsonl(rows), tokenizer).train
    assert one["input_ids"].tolist() == other["input_ids"].tolist()
    assert one["input_ids"].tolist().count(tokenizer.eos_token_id) == 1


def test_a_tokenizer_that_begins_texts_with_a_token_begins_sequences_with_it(tokenizer, jsonl, load):
    bos = tokenizer.convert_tokens_to_ids("<|im_start|>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", bos)]
    )
    (text,) = load(jsonl([{"text": "the fox"}], "a.jsonl"), tokenizer).train
    (pair,) = load(jsonl([{"prompt": "the", "completion": " fox"}], "b.jsonl"), tokenizer).train
    assert text["input_ids"].tolist() == pair["input_ids"].tolist() == [*tokenizer("the fox")["input_ids"], 2]
    trained = [token for token in pair["labels"].tolist() if token != -100]
    assert tokenizer.decode(trained) == " fox<|im_end|>"


@pytest.mark.parametrize("max_length", [2, 3, 7, 10, 11, 200])
def test_long_text_is_split_and_every_token_but_the_first_is_trained_once(tokenizer, jsonl, load, max_length):
    text = "the quick brown fox " * 3 + "zebra 🙂"
    data = load(jsonl([{"text": text}]), tokenizer, max_length=max_length)
    whole = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    pieces = [row["input_ids"].tolist() for row in data.train]
    trained = [token for row in data.train for token in row["labels"].tolist() if token != -100]
    assert trained == whole[1:]
    assert [*pieces[0], *(token for piece in pieces[1:] for token in piece[1:])] == whole
    assert all(2 <= len(piece) <= max_length for piece in pieces)
    assert data.report.train[0].split == (len(pieces) > 1)


def test_truncation_cuts_on_the_right_and_is_counted(tokenizer, jsonl, load):
    rows = [{"prompt": "the ", "completion": "quick brown fox " * 5}, {"prompt": "the ", "completion": "fox"}]
    path = jsonl(rows)
    cut, whole = load(path, tokenizer, max_length=8).train
    untouched = list(load(path, tokenizer).train)
    assert cut["input_ids"].tolist() == untouched[0]["input_ids"].tolist()[:8]
    assert cut["labels"].tolist() == untouched[0]["labels"].tolist()[:8]
    assert whole["input_ids"].tolist() == untouched[1]["input_ids"].tolist()
    assert load(path, tokenizer, max_length=8).report.train[0].truncated == 1
    dropped = load(path, tokenizer, max_length=8, truncation="drop").report.train[0]
    assert (dropped.kept, dropped.truncated, dropped.unused["too long"].count) == (1, 0, 1)
    assert dropped.unused["too long"].examples[0].startswith(f"{path}:1: ")


def test_a_prompt_that_fills_the_length_leaves_nothing_to_train_on(tokenizer, jsonl, load):
    rows = [{"prompt": "the quick brown fox " * 5, "completion": "yes"}, {"prompt": "the ", "completion": "fox"}]
    (report,) = load(jsonl(rows), tokenizer, max_length=8).report.train
    assert report.unused["no trained token"].examples[0].endswith("rows.jsonl:1: in the first 8 tokens")


def test_loss_on_all_trains_on_the_prompt_too(tokenizer, jsonl, load):
    (row,) = load(jsonl([{"prompt": "the ", "completion": "fox"}]), tokenizer, loss_on="all").train
    assert np.array_equal(row["labels"][1:], row["input_ids"][1:])


@pytest.mark.parametrize(
    ("row", "loss_on", "allowed"),
    [
        ({"text": "a"}, "assistant", "all"),
        ({"text": "a"}, "completion", "all"),
        ({"prompt": "a", "completion": "b"}, "assistant", "completion or all"),
        ({"messages": []}, "completion", "assistant or all"),
    ],
)
def test_a_loss_that_does_not_fit_the_form_is_refused(tokenizer, jsonl, load, row, loss_on, allowed):
    with pytest.raises(ValueError, match=rf"rows\.jsonl': loss_on: {loss_on} does not fit .* use {allowed}"):
        load(jsonl([row]), tokenizer, loss_on=loss_on)


def test_text_needs_an_end_token(tokenizer, jsonl, load):
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="the tokenizer has no eos_token"):
        load(jsonl([{"text": "a"}]), tokenizer)
