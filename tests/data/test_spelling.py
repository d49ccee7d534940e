"""What the tokens of a tokenizer spell."""

import pickle
from typing import Any

import numpy as np
import pytest
from alignment_laws import PARTS
from hypothesis import given, settings
from hypothesis import strategies as st
from readers import EXACT, LOSSY, fresh, reader
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

from kdlm.spelling import Spelling, spelling_of

texts = st.text(max_size=20) | st.lists(st.sampled_from(PARTS) | st.text(max_size=3), max_size=8).map("".join)


@settings(max_examples=100, deadline=None)
@given(texts)
def test_the_tokens_of_an_exact_tokenizer_spell_the_text_but_for_a_space_before_it(text):
    for kind in EXACT:
        spelling = spelling_of(reader(kind))
        ids = spelling.ids(text)
        spelt = spelling.text(ids)
        said = text if not spelling.begins_with_space else text.replace("▁", " ")  # it writes spaces so
        assert spelt in (said.encode(), b" " + said.encode())
        assert spelling.ends(ids)[-1:].tolist() == ([len(spelt)] if ids else [])
        assert spelling.count(ids) == len(spelt)


def test_which_tokenizers_give_back_what_they_read():
    assert all(spelling_of(reader(kind)).exact for kind in EXACT)
    assert not any(spelling_of(reader(kind)).exact for kind in LOSSY)
    beginning = [kind for kind in EXACT if spelling_of(reader(kind)).begins_with_space]
    assert beginning == ["unigram-1k", "spbpe-1k"]


@settings(max_examples=100, deadline=None)
@given(texts)
def test_a_lossy_tokenizers_tokens_end_in_order_and_at_the_end_of_the_text(text):
    for kind in LOSSY:
        spelling = spelling_of(reader(kind))
        ids = spelling.ids(text)
        ends = spelling.ends_in(text.encode(), ids)
        assert ends is not None and len(ends) == len(ids)
        assert not ids or ((np.diff(ends) >= 0).all() and ends[-1] == len(text.encode()))


def test_an_accent_belongs_to_the_letter_before_and_white_space_to_the_word_after():
    nfkc, wordpiece = spelling_of(reader("nfkc-1k")), spelling_of(reader("wordpiece-1k"))
    text = "e\u0301 x"
    assert nfkc.ends_in(text.encode(), nfkc.ids(text)).tolist()[-3:] in ([3, 4, 5], [3, 5, 5])
    assert wordpiece.ends_in(text.encode(), wordpiece.ids(text)).tolist() == [3, 5]
    ligature = nfkc.ends_in("ﬁ".encode(), nfkc.ids("ﬁ"))
    assert set(ligature.tolist()) == {3}, "what one character became ends together"


def test_tokens_that_are_not_how_a_text_is_read_have_no_ends_in_it():
    nfkc = spelling_of(reader("nfkc-1k"))
    ids = nfkc.ids("def f(x)")
    assert nfkc.ends_in(b"def f(y)", ids) is None
    assert nfkc.ends_in(b"def f(x", ids) is None
    assert nfkc.ends_in(b"\xff", ids) is None
    accented = nfkc.ids("ﬁ")
    assert nfkc.ends_in("ﬁ".encode(), accented[:-1]).tolist() == [4] * (len(accented) - 1), "cut inside a character"
    assert nfkc.ends_in(b"def f(x)", ids[:2]).tolist() == nfkc.ends_in(b"def f(x)", ids)[:2].tolist()


def test_control_tokens_spell_no_text_and_ids_beyond_the_vocabulary_are_unknown():
    tokenizer = reader("spbpe-1k")
    spelling = spelling_of(tokenizer)
    eos, unknown = tokenizer.eos_token_id, tokenizer.unk_token_id
    assert eos in spelling.control and unknown not in spelling.control
    assert spelling.lengths[eos] == 0 and len(spelling.lengths) == len(tokenizer)
    assert spelling.text([unknown]) is None and spelling.text([5_000]) is None and spelling.text([]) == b""
    ids = [*spelling.ids("def"), 5_000, *spelling.ids("f")]
    assert spelling.known(ids) == len(spelling.ids("def")) and spelling.count(ids) == len(b" def f")
    assert spelling.is_control([eos, 5_000, unknown]).tolist() == [True, False, False]


def test_a_role_that_shares_its_token_with_the_end_of_text_is_not_an_unknown_word(new_tokenizer):
    tokenizer = new_tokenizer()
    tokenizer.unk_token = tokenizer.bos_token = tokenizer.eos_token  # as GPT-2 has it
    spelling = Spelling(tokenizer)
    assert tokenizer.eos_token_id in spelling.control
    assert spelling.text([tokenizer.eos_token_id]) == b"<|im_end|>"


def test_an_added_token_spells_its_content(new_tokenizer):
    tokenizer = new_tokenizer()
    tokenizer.add_tokens([AddedToken("é ü", normalized=False), AddedToken("<think>", special=False)])
    spelling = Spelling(tokenizer)
    text = "é ü<think>é"
    assert spelling.text(spelling.ids(text)) == text.encode() and len(spelling.ids(text)) == 4


def test_letters_of_latin_1_are_bytes_for_byt5_only():
    letters = {chr(point): place for place, point in enumerate(range(32, 256))}
    model: Any = Tokenizer(models.WordLevel({**letters, "[UNK]": len(letters)}, unk_token="[UNK]"))
    model.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    from transformers import PreTrainedTokenizerFast

    spelling = Spelling(PreTrainedTokenizerFast(tokenizer_object=model, unk_token="[UNK]"))
    assert spelling.text(spelling.ids("é")) == "é".encode()
    assert spelling_of(reader("byt5")).text(reader("byt5")("é", add_special_tokens=False)["input_ids"]) == "é".encode()


def test_a_normalizer_that_only_composes_is_exact_and_reads_what_it_changes(new_tokenizer):
    tokenizer = new_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()  # as Qwen has it
    spelling = Spelling(tokenizer)
    text = "cafe\u0301 au lait"
    ids = spelling.ids(text)
    assert spelling.exact and spelling.text(ids) != text.encode()
    assert spelling.ends_in(text.encode(), ids)[-1] == len(text.encode())


def test_one_spelling_is_shared_and_a_worker_is_sent_the_tokenizer_alone():
    tokenizer = reader("1k")
    spelling = spelling_of(tokenizer)
    assert spelling_of(tokenizer) is spelling
    _ = spelling.lengths, spelling.exact
    assert len(pickle.dumps(spelling)) <= len(pickle.dumps(tokenizer)) + 200
    again = pickle.loads(pickle.dumps(spelling))
    assert again.pieces == spelling.pieces and again.control == spelling.control


@pytest.mark.parametrize("kind", ["1k", "spbpe-1k"])
def test_duplicates_in_a_vocabulary_spell_the_same(kind):
    tokenizer = fresh(kind)
    tokenizer.add_tokens([AddedToken("def", single_word=True)])
    spelling = Spelling(tokenizer)
    assert sum(piece == b"def" for piece in spelling.pieces) >= 1
    assert spelling.text(spelling.ids("def f")) in (b"def f", b" def f")
