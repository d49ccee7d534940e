"""Texts with a class each: which columns, labels and classes there are, and what is said of rows that do not fit."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from readers import reader

from kdlm.data import ClassCollator, TextClassesSection
from kdlm.signal import IGNORE_INDEX

ROWS = [
    {"text": "def f(x):", "label": "code", "other": "return x"},
    {"text": "a", "label": "prose", "other": "bc"},
    {"text": "while True:\n    pass", "label": None, "other": "x"},
    {"text": " ", "label": "code", "other": "x"},
    {"text": 3, "label": "code", "other": "x"},
]


def written(folder: Path, rows: list[dict[str, Any]], name: str = "rows") -> str:
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def section(path: str, **options: Any) -> TextClassesSection:
    return TextClassesSection(**{"train": [{"path": path}], **options})


def test_rows_become_tokens_and_numbers_of_classes_and_the_others_are_counted(tmp_path: Path) -> None:
    tokenizer = reader("tiny")
    data = section(written(tmp_path, ROWS)).load(tokenizer)
    assert data.made_with["classes"] == ["code", "prose"]
    assert data.train["labels"] == [0, 1, IGNORE_INDEX]
    assert data.train[0]["input_ids"] == tokenizer("def f(x):")["input_ids"]
    counted = data.report.train[0]
    assert counted.kept == 3 and counted.tokens == sum(data.train["length"])
    assert {reason: one.count for reason, one in counted.unused.items()} == {"empty": 1, "malformed": 1}


def test_pairs_are_read_as_the_tokenizer_reads_pairs_and_are_cut(tmp_path: Path) -> None:
    tokenizer, path = reader("tiny"), written(tmp_path, ROWS)
    pairs = section(path, columns={"text_pair": "other"}, max_length=6).load(tokenizer).train
    expected = tokenizer("def f(x):", "return x", truncation=True, max_length=6)["input_ids"]
    assert pairs[0]["input_ids"] == expected and len(expected) == 6


def test_a_batch_is_padded_with_one_class_a_row(tmp_path: Path) -> None:
    data = section(written(tmp_path, ROWS)).load(reader("tiny"))
    assert isinstance(data.collator, ClassCollator)
    batch = data.collator([data.train[i] for i in range(3)])
    assert batch["labels"].tolist() == [0, 1, IGNORE_INDEX] and batch["index"].tolist() == [0, 1, 2]
    assert batch["attention_mask"].sum(-1).tolist() == data.train["length"]
    for row, ids in zip(batch["input_ids"], data.train["input_ids"], strict=True):
        assert row[: len(ids)].tolist() == ids
    assert torch.equal(batch["input_ids"] == data.collator.pad_id, ~batch["attention_mask"].bool())


def test_numbers_are_classes_too_and_names_can_be_given(tmp_path: Path) -> None:
    path = written(tmp_path, [{"text": f"x = {number}", "label": number - 1} for number in range(4)])
    plain, named = section(path).load(reader("tiny")), section(path, classes=["no", "yes", "so"]).load(reader("tiny"))
    assert plain.made_with["classes"] == ["0", "1", "2"] and named.made_with["classes"] == ["no", "yes", "so"]
    assert plain.train["labels"] == named.train["labels"] == [IGNORE_INDEX, 0, 1, 2]
    assert plain.fingerprints != named.fingerprints


def test_what_does_not_fit_is_named_with_its_place(tmp_path: Path) -> None:
    path, tokenizer = written(tmp_path, ROWS), reader("tiny")
    with pytest.raises(ValueError, match=r"no column 'sentence' for text; its columns are .*data\.columns\.text"):
        section(path, columns={"text": "sentence"}).look()
    with pytest.raises(ValueError, match=r"rows\.jsonl.*: label 'prose' is none of the classes code, data"):
        section(path, classes=["code", "data"]).load(tokenizer)
    with pytest.raises(ValueError, match="no usable row"):
        section(written(tmp_path, ROWS[3:], "bad")).load(tokenizer)
    with pytest.raises(ValueError, match="its labels name 1 classes"):
        section(written(tmp_path, ROWS[:1], "one")).load(tokenizer)
    with pytest.raises(ValueError, match="take no weight, domain or columns"):
        TextClassesSection.model_validate({"train": [{"path": path, "weight": 2}]})


def test_the_sandbox_has_pieces_of_code_whose_module_is_known() -> None:
    data = TextClassesSection.model_validate(
        {"train": [{"path": "sandbox:code-modules/train"}], "eval": [{"path": "sandbox:code-modules/eval"}]}
    ).load(reader("tiny"))
    assert data.eval is not None and len(data.made_with["classes"]) == 8
    assert set(data.eval["labels"]) == set(range(8)) and 4 * len(data.eval) == pytest.approx(len(data.train), rel=0.02)
