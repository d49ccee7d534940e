import unicodedata

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from kdlm.sandbox import build
from kdlm.sandbox.catalog import CATALOG
from kdlm.sandbox.datasets import CodeTokenizer
from kdlm.sandbox.tokenizer_kinds import KINDS, SPACE

SIZES = {
    "code-tokenizer-tiny": 512,
    "code-tokenizer-bytes": 260,
    "code-tokenizer-unigram-1k": 1024,
    "code-tokenizer-unigram-tiny": 448,
    "code-tokenizer-spbpe-1k": 1024,
    "code-tokenizer-nfkc-1k": 1024,
    "code-tokenizer-wordpiece-1k": 1024,
}
BYTE_LEVEL = ["code-tokenizer-tiny", "code-tokenizer-bytes"]
WITH_BYTES = ["code-tokenizer-unigram-1k", "code-tokenizer-unigram-tiny", "code-tokenizer-spbpe-1k"]
TURNS = [
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "Answer: 4"},
    {"role": "user", "content": "And 3 + 3?"},
    {"role": "assistant", "content": "Answer: 6"},
]
PARTS = [
    "  ",
    "\n\n\t",
    "\r\n",
    "12",
    "e\u0301",
    "ﬁ",
    "👩‍🔬",
    "<0x41>",
    "##a",
    "def f",
    "    return",
    "Ġ",
    "\0",
    "</",
    "漢",
]
texts = st.text() | st.lists(st.sampled_from(PARTS) | st.text(max_size=3)).map("".join)


@pytest.fixture(scope="module")
def tokenizers():
    return {name: AutoTokenizer.from_pretrained(build(name, progress=None)) for name in SIZES}


def there_and_back(tokenizer, text: str) -> str:
    return tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"])


def test_there_is_a_tokenizer_of_every_kind(tokenizers):
    assert {CATALOG[name].spec.kind for name in tokenizers} == set(KINDS)


@pytest.mark.parametrize("name", SIZES)
def test_a_tokenizer_has_as_many_ids_as_it_says_and_its_special_tokens_are_one_id_each(tokenizers, name):
    tokenizer, markup = tokenizers[name], KINDS[CATALOG[name].spec.kind][0]
    assert tokenizer.is_fast and len(tokenizer) == SIZES[name]
    assert sorted(tokenizer.get_vocab().values()) == list(range(SIZES[name]))
    assert tokenizer.all_special_ids and set(tokenizer.all_special_tokens) == set(markup.special)
    for number, token in enumerate(markup.special):
        assert token in tokenizer(f"x{token}y")["input_ids"] or number in tokenizer(f"x{token}y")["input_ids"]
        assert tokenizer.convert_tokens_to_ids(token) == number


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts)
def test_any_text_survives_the_byte_level_kinds(tokenizers, text):
    for name in BYTE_LEVEL:
        assert there_and_back(tokenizers[name], text) == text


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts)
def test_any_text_survives_the_kinds_with_byte_fallback_but_for_the_letter_that_they_write_a_space_with(
    tokenizers, text
):
    for name in WITH_BYTES:
        assert there_and_back(tokenizers[name], text) == text.replace(SPACE, " ")


def test_every_code_file_survives_the_lossless_kinds(tokenizers):
    from kdlm.sandbox.jsonl import read_jsonl

    documents = [row["text"] for row in read_jsonl(build("code", progress=None) / "eval.jsonl")][:5]
    for name in BYTE_LEVEL + WITH_BYTES:
        for text in documents:
            assert there_and_back(tokenizers[name], text) == text


@given(st.binary(max_size=30))
def test_the_id_of_a_byte_is_the_byte_after_the_special_tokens(tokenizers, raw):
    text = raw.decode("utf-8", "ignore")
    assert tokenizers["code-tokenizer-bytes"](text)["input_ids"] == [4 + byte for byte in text.encode()]


def test_the_lossy_kinds_lose_what_they_say(tokenizers):
    nfkc, wordpiece = tokenizers["code-tokenizer-nfkc-1k"], tokenizers["code-tokenizer-wordpiece-1k"]
    for text in ("ﬁne", "cafe\u0301", "x²"):
        assert there_and_back(nfkc, text) == unicodedata.normalize("NFKC", text) != text
    for text in ("def f(x):\n    return 12\n", "a\tb", "café"):
        assert there_and_back(nfkc, text) == text, "code and accents are as they were"
    assert there_and_back(nfkc, "a 🧪") == "a <unk>" and there_and_back(nfkc, "  x") == " x"
    assert wordpiece.tokenize("Café 🧪") == wordpiece.tokenize("cafe 🧪") and "[UNK]" in wordpiece.tokenize("🧪")
    assert any(token.startswith("##") for token in wordpiece.tokenize("unwindable"))


def test_only_the_kind_after_llama_puts_a_token_before_every_text(tokenizers):
    for name, tokenizer in tokenizers.items():
        first = tokenizer.convert_ids_to_tokens(tokenizer("x")["input_ids"])[0]
        assert (first == "<s>") == (name == "code-tokenizer-spbpe-1k")


def test_an_expressible_id_of_a_byte_is_no_piece_of_a_text(tokenizers):
    for name in WITH_BYTES:
        tokens = tokenizers[name].tokenize("<0x41>")
        assert "<0x41>" not in tokens and "".join(tokens) == SPACE + "<0x41>"


@pytest.mark.parametrize("name", SIZES)
def test_every_chat_template_marks_what_the_assistant_said_and_begins_with_its_prompt(tokenizers, name):
    tokenizer = tokenizers[name]
    prompt = tokenizer.apply_chat_template(TURNS[:1], tokenize=False, add_generation_prompt=True)
    assert tokenizer.apply_chat_template(TURNS, tokenize=False).startswith(prompt)
    if name == "code-tokenizer-wordpiece-1k":
        return  # it loses the spaces
    encoded = tokenizer.apply_chat_template(TURNS, return_dict=True, return_assistant_tokens_mask=True)
    pairs = zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)
    said = tokenizer.decode([token for token, mask in pairs if mask], skip_special_tokens=True)
    assert said.split() == "Answer: 4 Answer: 6".split() or said == "Answer: 4Answer: 6"


def test_too_few_texts_for_so_many_ids_are_refused(tmp_path):
    from kdlm.sandbox.tokenizer import train_tokenizer

    for kind, size in (("unigram", 1024), ("spbpe", 1024), ("wordpiece", 1024)):
        with pytest.raises(ValueError, match="1024 were asked for"):
            train_tokenizer(["def f(x): return x"], size, tmp_path / kind, kind)
    assert not list(tmp_path.iterdir())


def test_the_tokenizers_from_before_there_were_kinds_keep_their_folders():
    assert "kind" not in CodeTokenizer(512).ingredients() and CodeTokenizer(512, kind="nfkc").ingredients()["kind"]
