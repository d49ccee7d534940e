"""From a data section to splits: nothing lost, nothing twice, everything counted."""

import json

import pytest
import torch
from pydantic import ValidationError
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from kdlm.data import DataSection

TEXTS = [{"text": f"the answer is {i * i} and {'so ' * (i % 7)}on"} for i in range(40)]


def ids_of(rows):
    return sorted(tuple(int(token) for token in row["input_ids"]) for row in rows)


def split_at_ends(rows):
    """The sequences in packed rows."""
    found = []
    for row in rows:
        ids = [int(token) for token in row["input_ids"]]
        for length in row["seq_lengths"]:
            found.append(tuple(ids[:length]))
            ids = ids[length:]
    return sorted(found)


def test_every_row_becomes_a_numbered_sequence_with_its_length(load, tokenizer, jsonl):
    data = load(jsonl(TEXTS), tokenizer)
    assert data.eval is None and data.fingerprints.keys() == {"train"}
    assert [tokenizer.decode(row["input_ids"]) for row in data.train] == [row["text"] + "<|im_end|>" for row in TEXTS]
    assert [row["index"] for row in data.train] == list(range(40))
    assert all(row["length"] == len(row["input_ids"]) == len(row["labels"]) for row in data.train)
    report = data.report.train[0]
    assert (report.rows, report.kept, report.sequences) == (40, 40, 40)
    assert report.tokens == sum(row["length"] for row in data.train) == report.trained_tokens + 40


@pytest.mark.parametrize("how", [{"eval_rows": 6}, {"eval_fraction": 0.15}])
def test_a_split_is_disjoint_complete_and_the_same_every_time(load, tokenizer, jsonl, how):
    path = jsonl([*TEXTS, *TEXTS[:5]])
    data, again = load(path, tokenizer, **how), load(path, tokenizer, seed=3, **how)
    train, held = ids_of(data.train), ids_of(data.eval)
    assert len(set(held)) == 6 and not set(train) & set(held)
    assert sorted(train + held) == ids_of(load(path, tokenizer).train)
    assert ids_of(again.eval) == held and again.fingerprints == data.fingerprints
    other = load(path, tokenizer, split_seed=1, **how)
    assert ids_of(other.eval) != held and not set(other.fingerprints.values()) & set(data.fingerprints.values())
    assert ids_of(load(jsonl([*TEXTS[::-1], *TEXTS[:5]], "back.jsonl"), tokenizer, **how).eval) == held


def test_pieces_of_one_row_stay_on_one_side(load, tokenizer, jsonl):
    rows = [{"text": f"{i} fox {i} " * 20} for i in range(6)]
    data = load(jsonl(rows), tokenizer, max_length=16, eval_rows=2)
    sides = [
        {tokenizer.decode(row["input_ids"])[:200].split(" fox ")[-1].split()[0] for row in side}
        for side in (data.train, data.eval)
    ]
    assert len(sides[1]) == 2 and not sides[0] & sides[1]


def test_evaluation_may_have_sources_of_its_own(load, tokenizer, jsonl):
    data = load(
        jsonl(TEXTS), tokenizer, eval=[{"path": jsonl(TEXTS[:3], "a.jsonl")}, {"path": jsonl(TEXTS[3:5], "b.jsonl")}]
    )
    assert (len(data.train), len(data.eval)) == (40, 5)
    assert [row["index"] for row in data.eval] == [0, 1, 2, 3, 4]
    assert data.fingerprints.keys() == {"train", "eval"} and len(data.report.eval) == 2


def test_sources_are_mixed_by_weight(load, tokenizer, jsonl):
    sources = [
        {"path": jsonl([{"text": f"a {i}"} for i in range(30)], "a.jsonl"), "weight": 3.0},
        {"path": jsonl([{"text": f"b {i}"} for i in range(30)], "b.jsonl"), "weight": 1.0},
    ]
    for section in ({}, {"streaming": True, "shuffle_buffer": 0}):
        data = load(sources, tokenizer, stopping_strategy="first_exhausted", **section)
        texts = [tokenizer.decode(row["input_ids"]) for row in data.train]
        assert sum(text.startswith("a") for text in texts) == 30
        assert abs(sum(text.startswith("b") for text in texts) - 10) <= 1
        assert len(set(texts)) == len(texts)
    repeated = load(sources, tokenizer).train
    assert set(ids_of(repeated)) == set(ids_of(load([{"path": one["path"]} for one in sources], tokenizer).train))
    assert len(repeated) == pytest.approx(120, abs=2)


def test_sources_without_weights_are_all_used_once(load, tokenizer, jsonl):
    paths = [jsonl(TEXTS[:25], "a.jsonl"), jsonl(TEXTS[25:], "b.jsonl")]
    whole = ids_of(load(jsonl(TEXTS), tokenizer).train)
    assert ids_of(load(paths, tokenizer).train) == ids_of(load(paths, tokenizer, streaming=True).train) == whole


@pytest.mark.parametrize("packing", ["none", "pack"])
def test_a_stream_has_the_content_of_stored_rows(load, tokenizer, jsonl, packing):
    path = jsonl([*TEXTS, {"text": ""}])
    stored = load(path, tokenizer, packing=packing, max_length=64)
    streamed = load(path, tokenizer, packing=packing, max_length=64, streaming=True)
    rows = list(streamed.train)
    assert ids_of(rows) == ids_of(stored.train)
    assert rows[0].keys() == stored.train[0].keys()
    assert streamed.report.train == stored.report.train
    assert ids_of(streamed.train) == ids_of(rows)  # a second pass, whose report does not add to the first
    assert streamed.report.train == stored.report.train


def test_a_stream_is_shuffled_by_the_seed_among_its_buffer(load, tokenizer, jsonl):
    path = jsonl(TEXTS)
    orders = [[row["index"] for row in load(path, tokenizer, streaming=True, seed=seed).train] for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2] and sorted(orders[0]) == list(range(40))
    in_order = load(path, tokenizer, streaming=True, shuffle_buffer=0).train
    assert [row["index"] for row in in_order] == list(range(40))


def test_packing_keeps_every_sequence_whole_and_once(load, tokenizer, jsonl):
    path = jsonl(TEXTS)
    loose, packed = (
        load(path, tokenizer, max_length=64),
        load(path, tokenizer, max_length=64, packing="pack", eval_rows=4),
    )
    assert sorted(split_at_ends(packed.train) + split_at_ends(packed.eval)) == ids_of(loose.train)
    assert all(row["length"] == sum(row["seq_lengths"]) <= 64 for row in packed.train)
    numbers = [int(i) for side in (packed.train, packed.eval) for row in side for i in row["index"]]
    assert sorted(numbers) == list(range(40))
    assert any("packed train: 36 sequences in" in note for note in packed.report.notes)
    batch = packed.collator(list(packed.train))
    assert batch["input_ids"].shape[0] == 1 and (batch["position_ids"] == 0).sum() == 36


def test_rows_that_cannot_be_used_are_counted_and_named(load, tokenizer, jsonl):
    rows = [{"text": "the fox"}, {"text": ""}, {"text": 3}, {"words": "x"}, {"text": None}, *[{"text": " "}] * 4]
    path = jsonl(rows)
    report = load(path, tokenizer).report
    (counts,) = report.train
    assert (counts.rows, counts.kept) == (9, 1)
    assert {reason: unused.count for reason, unused in counts.unused.items()} == {"empty": 6, "malformed": 2}
    assert counts.unused["empty"].examples == [f"{path}:{line}: text is empty" for line in (2, 5, 6)]
    assert counts.unused["malformed"].examples == [f"{path}:3: text is int, not text", f"{path}:4: no column 'text'"]
    assert f"{path}: 6 rows not used, empty: {path}:2: text is empty; " in str(report)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_source_without_a_usable_row_is_an_error(load, tokenizer, jsonl, streaming):
    path = jsonl([{"text": ""}, {"text": 1}])
    with pytest.raises(ValueError, match=r"rows\.jsonl': no usable row\n.*0 of 2 rows used[\s\S]*:2: text is int"):
        list(load(path, tokenizer, streaming=streaming).train)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"train": []}, "at least 1 item"),
        ({"eval_rows": 1, "eval_fraction": 0.5}, "keep one"),
        ({"streaming": True, "eval_rows": 1}, "name `eval` sources instead"),
        ({"train": [{"path": "a", "weight": 1}, {"path": "b"}]}, "give one to each"),
        ({"eval": [{"path": "a", "weight": 1}]}, "eval sources take no weight"),
        ({"max_length": 1}, "greater than or equal to 2"),
        ({"train": [{"path": "a", "columns": {"body": "text"}}]}, "Input should be 'messages'"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(section, message):
    with pytest.raises(ValidationError, match=message):
        DataSection.model_validate({"train": [{"path": "a"}], **section})


@pytest.mark.parametrize("section", [{}, {"streaming": True}, {"packing": "pack"}, {"packing": "padding_free"}])
def test_the_hugging_face_trainer_takes_the_rows(load, tokenizer, jsonl, tmp_path, section):
    data = load(jsonl(TEXTS), tokenizer, max_length=64, **section)
    seen = []

    class Recorder(Trainer):
        def compute_loss(self, model, inputs, **_):
            seen.append(inputs)
            return model(input_ids=inputs["input_ids"], use_cache=False).logits.sum() * 0

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes))
    sampling = {} if section.get("streaming") else {"train_sampling_strategy": "group_by_length"}
    arguments = TrainingArguments(
        str(tmp_path / "out"),
        max_steps=3,
        per_device_train_batch_size=2,
        remove_unused_columns=False,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **sampling,
    )
    Recorder(model, arguments, train_dataset=data.train, data_collator=data.collator).train()
    assert len(seen) == 3 and all(batch["input_ids"].dtype == torch.int64 for batch in seen)
    key = "position_ids" if "packing" in section else "attention_mask"
    assert all(batch[key].shape == batch["labels"].shape for batch in seen)


def test_a_report_is_plain_data(load, tokenizer, jsonl):
    report = load(jsonl(TEXTS), tokenizer, eval_rows=3).report
    assert json.loads(json.dumps(report.as_dict()))["notes"] == ["held out for evaluation: 3 of 40 sequences"]
