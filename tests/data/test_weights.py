"""Weights of rows: read from a column, checked, counted where they are wrong, and handed on by every layout."""

import numpy as np
import pytest
import torch

from kdlm.data import Collator

A = [{"text": f"alpha number {i} and so on", "w": 0.5 * i} for i in range(7)]
B = [{"text": f"beta {i}"} for i in range(5)]


def by_index(data):
    found = {}
    for row in data:
        for index, weight in zip(np.ravel(row["index"]), np.ravel(row["weight"]), strict=True):
            found[int(index)] = float(weight)
    return found


def weighed(jsonl, rows=A):
    return {"path": jsonl(rows, "a.jsonl"), "columns": {"weight": "w"}}


@pytest.mark.parametrize("packing", ["none", "padding_free", "pack"])
@pytest.mark.parametrize("streaming", [False, True])
def test_every_sequence_has_the_weight_of_its_row_and_1_where_its_source_has_none(
    load, tokenizer, jsonl, packing, streaming
):
    options = {"streaming": True, "shuffle_buffer": 0} if streaming else {}
    sources = [weighed(jsonl), {"path": jsonl(B, "b.jsonl")}]
    data = load(sources, tokenizer, packing=packing, max_length=40, **options)
    assert by_index(data.train) == {i: 0.5 * i if i < 7 else 1.0 for i in range(12)}
    batch = data.collator(list(data.train))
    assert batch["weight"].dtype == torch.float32 and sorted(batch["weight"].tolist()) == sorted(
        by_index(data.train).values()
    )


def test_pieces_of_a_long_text_have_its_weight(load, tokenizer, jsonl):
    data = load(
        [weighed(jsonl, [{"text": "one two three " * 20, "w": 2}, {"text": "four", "w": 3}])], tokenizer, max_length=16
    )
    assert len(data.train) > 2 and {float(w) for w in data.train["weight"][:-1]} == {2.0}
    assert float(data.train["weight"][-1]) == 3.0


@pytest.mark.parametrize("wrong", [None, -1.0, float("nan"), float("inf")])
def test_a_row_whose_weight_is_no_number_from_0_on_is_counted_and_not_used(load, tokenizer, jsonl, wrong):
    data = load([weighed(jsonl, [*A[:2], {"text": "wrong", "w": wrong}])], tokenizer)
    assert len(data.train) == 2
    unused = data.report.train[0].unused["malformed"]
    assert unused.count == 1 and "weight is" in unused.examples[0]


def test_a_weight_that_is_text_is_counted_and_not_used(load, tokenizer, jsonl):
    data = load([weighed(jsonl, [{"text": "right", "w": 0}, {"text": "wrong", "w": "2"}])], tokenizer)
    assert data.train["weight"][:].tolist() == [0.0]
    assert "weight is str, not a number" in data.report.train[0].unused["malformed"].examples[0]


def test_rows_weighed_anew_are_split_as_before(load, tokenizer, jsonl):
    texts = [row["text"] for row in A]
    splits = []
    for factor in (1, 3):
        rows = [{"text": text, "w": factor * number} for number, text in enumerate(texts)]
        splits.append(load([weighed(jsonl, rows)], tokenizer, eval_rows=3))
    first, second = (list(one.eval["index"]) for one in splits)
    assert first == second


def test_without_a_weight_there_is_none_in_the_batch(load, tokenizer, jsonl):
    data = load([{"path": jsonl(B, "b.jsonl")}], tokenizer)
    assert "weight" not in data.train.column_names and "weight" not in data.collator(list(data.train))


def test_weights_are_those_of_sequences_in_the_order_of_the_batch():
    rows = [{"input_ids": [1, 2], "labels": [1, 2], "weight": w} for w in (0.25, 3)]
    for layout in ("padded", "padding_free"):
        assert Collator(0, layout=layout)(rows)["weight"].tolist() == [0.25, 3.0]
