from pathlib import Path
from typing import get_args

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from kdlm.sandbox import SandboxModel, build, is_built, names
from kdlm.sandbox.catalog import CATALOG
from kdlm.sandbox.language_models import LanguageModel, PaddedModel
from kdlm.sandbox.pretraining import encode_documents, held_out_loss
from kdlm.sandbox.progress import silent
from kdlm.sandbox.tokenizer import SPECIAL_TOKENS


def tiny(name: str) -> Path:
    return build(f"code-{name}-tiny", progress=None)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(tiny("tokenizer"))


def open_model(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def test_every_model_section_names_a_model_of_the_catalogue_and_none_is_left_out():
    models = {name for name, entry in CATALOG.items() if isinstance(entry.spec, LanguageModel | PaddedModel)}
    assert set(get_args(SandboxModel.model_fields["model"].annotation)) == models


def test_the_catalogue_says_what_each_thing_is():
    assert len({entry.name for entry in names()}) == len(names())
    for entry in names():
        assert entry.what and entry.size and entry.seconds > 0
        assert all(need in CATALOG for need in entry.spec.needs)


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'code-teacher'"):
        build("code-teachr")


def test_the_tiny_pair_opens_and_shares_its_tokenizer(tokenizer):
    teacher, student = tiny("teacher"), tiny("student")
    assert is_built("code-teacher-tiny")
    vocabularies = [AutoTokenizer.from_pretrained(folder).get_vocab() for folder in (teacher, student)]
    assert vocabularies[0] == vocabularies[1] == tokenizer.get_vocab()
    for folder in (teacher, student):
        model = open_model(folder)
        assert model.config.vocab_size == len(tokenizer) == 512
        assert model.config.eos_token_id == tokenizer.eos_token_id
        assert model.generate(torch.tensor([[5, 6]]), max_new_tokens=3, do_sample=False).shape[1] <= 5


@pytest.mark.parametrize(("kind", "positions"), [("unigram", 2048), ("bytes", 4096)])
def test_a_tiny_student_reads_another_tokenizer_than_the_teacher_and_writes_it_beside_its_weights(kind, positions):
    folder = build(f"code-student-tiny-{kind}", progress=None)
    own, spec = AutoTokenizer.from_pretrained(folder), CATALOG[f"code-student-tiny-{kind}"].spec
    alone = AutoTokenizer.from_pretrained(build(spec.tokenizer, progress=None))
    text = "def café(x):\n    return  12\n"
    assert own(text)["input_ids"] == alone(text)["input_ids"] and own.chat_template == alone.chat_template
    assert own.get_vocab() != AutoTokenizer.from_pretrained(tiny("teacher")).get_vocab()
    model = open_model(folder)
    assert model.config.vocab_size == len(own) and model.config.max_position_embeddings == positions
    assert (model.config.eos_token_id, model.config.pad_token_id) == (own.eos_token_id, own.pad_token_id)
    loss = model(**own(text, return_tensors="pt"), labels=own(text, return_tensors="pt")["input_ids"]).loss
    assert abs(loss.item() - torch.tensor(len(own)).log().item()) < 0.5, "it knows nothing yet"


def test_the_models_from_before_there_was_a_choice_of_positions_keep_their_folders():
    assert "positions" not in CATALOG["code-student"].spec.ingredients()
    assert CATALOG["code-student-bytes"].spec.ingredients()["positions"] == 4096


def test_the_trained_teacher_is_better_than_a_fresh_student(tokenizer):
    tokens = encode_documents(tokenizer, build("code", progress=None) / "eval.jsonl")[:8_192]
    teacher, student = (held_out_loss(open_model(tiny(name)), tokens, 64) for name in ("teacher", "student"))
    assert teacher < student - 0.5


def test_a_padded_teacher_says_the_same_on_the_real_ids():
    plain, padded = open_model(tiny("teacher")), open_model(build("code-teacher-tiny-padded", progress=None))
    ids = torch.randint(512, (2, 33))
    with torch.no_grad():
        expected, found = plain(input_ids=ids).logits, padded(input_ids=ids).logits
    assert found.shape[-1] == 544
    torch.testing.assert_close(found[..., :512], expected, rtol=1e-5, atol=1e-5)
    assert found[..., 512:].std() > 0.01, "the added rows are not zeros: whoever forgets to cut them will notice"


def test_building_leaves_the_random_state_of_the_caller_alone(tmp_path):
    spec = CATALOG["code-student-tiny"].spec
    before = torch.get_rng_state()
    spec.make(tmp_path, {"code-tokenizer-tiny": tiny("tokenizer")}, silent, "student")
    assert torch.equal(torch.get_rng_state(), before)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text() | st.lists(st.sampled_from([*SPECIAL_TOKENS, " ", "\n\t", "12", "é", "🧪", "def f"])).map("".join))
def test_any_text_survives_the_tokenizer(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_digits_are_tokens_of_their_own(tokenizer):
    assert len(tokenizer("1984")["input_ids"]) == 4


def test_the_chat_template_marks_what_the_assistant_said(tokenizer):
    turns = [
        {"role": "user", "content": "What is 2 + 2?"},
        {"role": "assistant", "content": "Answer: 4"},
        {"role": "user", "content": "And 3 + 3?"},
        {"role": "assistant", "content": "Answer: 6"},
    ]
    encoded = tokenizer.apply_chat_template(turns, return_dict=True, return_assistant_tokens_mask=True)
    kept = [token for token, mask in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if mask]
    assert tokenizer.decode(kept) == "Answer: 4<|im_end|>Answer: 6<|im_end|>"
    prompt = tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(turns, tokenize=False)
    assert whole.startswith(prompt), "a prompt is the beginning of the conversation that answers it"
