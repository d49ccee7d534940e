"""Two tokenizers are compared by what each id means, never by size."""

import json

import pytest
import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from kdlm.data.vocabulary import shared_vocabulary


def edited(tokenizer, edit):
    """Return a copy whose tokenizer.json went through `edit`."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    edit(state)
    copy = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)), eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    copy.chat_template = tokenizer.chat_template
    return copy


def test_one_tokenizer_shares_everything_and_padded_rows_nothing(tokenizer, new_tokenizer):
    size = len(tokenizer)
    shared = shared_vocabulary(tokenizer, new_tokenizer(), size + 24, size + 152)
    assert shared.require() == len(shared) == size
    assert shared.identical and not shared.conflicts and not shared.differences


def test_other_ids_for_the_same_tokens_are_refused_with_examples(tokenizer):
    def swap(state):
        vocab = state["model"]["vocab"]
        vocab["a"], vocab["b"] = vocab["b"], vocab["a"]

    other = edited(tokenizer, swap)
    assert len(other) == len(tokenizer)
    shared = shared_vocabulary(tokenizer, other, 512, 512)
    a = tokenizer.convert_tokens_to_ids("a")
    assert not shared.identical
    with pytest.raises(ValueError, match=rf"id {a} is 'a' for the student, 'b' for the teacher.*sequence_kd"):
        shared.require()


def test_a_larger_vocabulary_of_the_same_beginning_is_refused(new_tokenizer):
    small, large = new_tokenizer(300), new_tokenizer(340)
    for pair in ((small, large), (large, small)):
        with pytest.raises(ValueError, match=r"id 300 is .*unknown"):
            shared_vocabulary(*pair, 512, 512).require()


def test_other_merges_of_the_same_vocabulary_are_refused(tokenizer):
    other = edited(tokenizer, lambda state: state["model"].update(merges=state["model"]["merges"][::-1]))
    assert other.get_vocab() == tokenizer.get_vocab()
    with pytest.raises(ValueError, match="text is split differently"):
        shared_vocabulary(tokenizer, other, 512, 512).require()


def test_another_normaliser_is_refused(tokenizer):
    other = edited(tokenizer, lambda state: state.update(normalizer={"type": "Lowercase"}))
    assert shared_vocabulary(tokenizer, other, 512, 512).conflicts


def test_added_tokens_of_one_side_are_left_out_and_named(tokenizer, new_tokenizer):
    teacher = new_tokenizer()
    teacher.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    shared = shared_vocabulary(tokenizer, teacher, 512, 512)
    assert shared.require() == len(tokenizer) and not shared.identical
    assert f"id {len(tokenizer)} is unknown for the student, '<think>' for the teacher" in shared.differences[0]


def test_renamed_added_tokens_leave_a_list_of_ids(tokenizer):
    def rename(state):
        state["added_tokens"][1]["content"] = "<|user|>"
        vocab = state["model"]["vocab"]
        vocab["<|user|>"] = vocab.pop("<|im_start|>")

    shared = shared_vocabulary(tokenizer, edited(tokenizer, rename), 512, 512)
    assert torch.equal(shared.require(), torch.tensor([i for i in range(len(tokenizer)) if i != 1]))
    assert len(shared) == len(tokenizer) - 1


def test_ids_beyond_a_head_are_left_out_and_named(tokenizer):
    shared = shared_vocabulary(tokenizer, tokenizer, len(tokenizer) - 10, 512)
    assert shared.ids == len(tokenizer) - 10
    assert (
        f"head has {len(tokenizer) - 10} rows, but its tokenizer knows 10 tokens from id {len(tokenizer) - 10}"
        in shared.differences[0]
    )


def test_end_tokens_and_templates_that_differ_are_named(tokenizer, new_tokenizer):
    teacher = new_tokenizer(template=None)
    teacher.eos_token = "<|endoftext|>"
    differences = " ".join(shared_vocabulary(tokenizer, teacher, 512, 512).differences)
    assert "eos_token is '<|im_end|>' for the student, '<|endoftext|>' for the teacher" in differences
    assert "only one can be asked in chat form" in differences
