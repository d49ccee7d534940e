"""`training:` mirrors transformers' TrainingArguments: same names, same defaults, few exceptions."""

import dataclasses

import pytest
from pydantic import ValidationError
from transformers import TrainingArguments

from kdlm.training_arguments import DEFAULTS, NOT_NEGATIVE, POSITIVE, SHARES, Training


def test_every_key_is_a_training_argument_with_the_same_default(tmp_path):
    theirs = TrainingArguments(output_dir=str(tmp_path))
    ours = Training().build(output_dir=str(tmp_path))
    for name in set(Training.model_fields) - set(DEFAULTS):
        assert getattr(ours, name) == getattr(theirs, name), name


def test_limits_are_on_fields_that_exist():
    assert {*POSITIVE, *NOT_NEGATIVE, *SHARES, *DEFAULTS} <= set(Training.model_fields)


def test_what_is_set_arrives(tmp_path):
    section = Training(learning_rate=1e-3, max_steps=5, lr_scheduler_type="cosine", optim="adamw_torch", report_to=[])
    args = section.build(output_dir=str(tmp_path), seed=3)
    assert (args.learning_rate, args.max_steps, args.seed) == (1e-3, 5, 3)
    assert args.lr_scheduler_type.value == "cosine"


def test_kdlm_reports_to_nobody_unless_told(tmp_path):
    assert Training().build(output_dir=str(tmp_path)).report_to == []
    assert Training(report_to="tensorboard").build(output_dir=str(tmp_path)).report_to == ["tensorboard"]


@pytest.mark.parametrize(
    ("chosen", "gpu", "bf16"),
    [
        ({}, False, False),
        ({}, True, True),
        ({"use_cpu": True}, True, False),
        ({"fp16": True}, True, False),
        ({"bf16": False}, True, False),
    ],
)
def test_bf16_is_on_where_a_gpu_has_it_and_nothing_speaks_against_it(monkeypatch, chosen, gpu, bf16):
    monkeypatch.setattr("kdlm.training_arguments._bf16_on_gpu", lambda: gpu)
    got = {}
    monkeypatch.setattr("kdlm.training_arguments.TrainingArguments", lambda **given: got.update(given))
    Training(**chosen).build(output_dir="x")
    assert got["bf16"] is bf16


@pytest.mark.parametrize("name", ["output_dir", "seed", "push_to_hub", "hub_token", "remove_unused_columns"])
def test_what_kdlm_decides_itself_cannot_be_set(name):
    assert name in {field.name for field in dataclasses.fields(TrainingArguments)}
    with pytest.raises(ValidationError, match="not permitted"):
        Training(**{name: "x"})
