"""The sandbox's vision-language models open by transformers, and the teacher answers."""

import json

import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from kdlm.sandbox import build
from kdlm.sandbox.digits import digits
from kdlm.sandbox.digits_questions import NAMES, QUESTIONS
from kdlm.sandbox.vision_language import words
from kdlm.sandbox.vision_language_training import answered, encoded


def test_every_digit_is_asked_about_in_every_way_with_the_right_answer() -> None:
    rows = pq.read_table(build("digits-questions", progress=None) / "eval.parquet").to_pylist()
    _, held_out = digits()
    assert len(rows) == len(held_out.labels) * len(QUESTIONS)
    named = [row["completion"] for row in rows if row["prompt"] == "which digit is this ?"]
    assert named == [NAMES[digit] for digit in held_out.labels.tolist()]
    known = set(words())
    assert all(word in known for row in rows for word in f"{row['prompt']} {row['completion']}".split())


def test_the_student_opens_with_a_processor_of_known_words() -> None:
    folder = build("digits-vlm-student", progress=None)
    model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    assert model.config.text_config.vocab_size == len(processor.tokenizer) == len(words())
    assert processor.tokenizer.convert_tokens_to_ids("<image>") == model.config.image_token_id
    rows = encoded(processor, build("digits-questions", progress=None) / "eval.parquet", 6)
    assert rows["pixel_values"].shape == (6, 3, 8, 8) and rows["pixel_values"].abs().max() <= 1
    assert ((rows["input_ids"] == model.config.image_token_id).sum(-1) == 16).all()
    assert processor.tokenizer.decode(rows["answers"][0][rows["answers"][0] >= 0]).split() != []


def test_another_build_of_the_student_makes_the_same_weights_and_leaves_the_random_state_alone(tmp_path) -> None:
    before = torch.get_rng_state()
    first = AutoModelForImageTextToText.from_pretrained(build("digits-vlm-student", progress=None))
    second = AutoModelForImageTextToText.from_pretrained(build("digits-vlm-student", cache=tmp_path, progress=None))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_teacher_answers_what_it_has_not_seen() -> None:
    folder = build("digits-vlm-teacher", progress=None)
    model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    accuracy = answered(model, encoded(processor, build("digits-questions", progress=None) / "eval.parquet"))
    assert accuracy >= 0.9
    assert json.loads((folder / "sandbox.json").read_text())["figures"]["held_out_accuracy"] >= 0.9
