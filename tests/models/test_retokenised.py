"""A model given another tokenizer keeps its body, and the rows of what both tokenizers can say."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from kdlm.models import Retokenised
from kdlm.models.retokenised import open_tokenizer, retokenise
from kdlm.models.token_rows import token_rows
from kdlm.spelling import Spelling

OLD, BYTES, UNIGRAM = (f"sandbox:code-tokenizer-{kind}" for kind in ("tiny", "bytes", "unigram-tiny"))
SIZES = {
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "eos_token_id": 0,
    "pad_token_id": 1,
}
MODELS: dict[str, Callable[..., Any]] = {
    "untied": lambda **more: LlamaForCausalLM(LlamaConfig(**SIZES | more)),
    "tied": lambda **more: Qwen3ForCausalLM(Qwen3Config(**SIZES | more, head_dim=16, tie_word_embeddings=True)),
    "with a bias": lambda **more: PhiForCausalLM(PhiConfig(**SIZES | more)),
}


def folder_of(path, kind: str, tokenizer: str = OLD, **more) -> str:
    """Write a model of random weights with its tokenizer."""
    model = MODELS[kind](**more)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.normal_()  # a bias that starts at 0 would hide where it goes
    model.save_pretrained(path)
    open_tokenizer(tokenizer).save_pretrained(path)
    return str(path)


def student(path, tokenizer: str, **options) -> Retokenised:
    source = {"name": "pretrained", "path": str(path)}
    return Retokenised.model_validate({"source": source, "tokenizer_from": tokenizer, **options})


@pytest.fixture(params=MODELS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def test_the_same_tokenizer_leaves_the_model_as_it_is_bit_for_bit(tmp_path, kind):
    path = folder_of(tmp_path, kind)
    before, after = AutoModelForCausalLM.from_pretrained(path), student(path, OLD).load()
    ids = torch.arange(4, 20)[None]
    assert torch.equal(before(ids).logits, after(ids).logits)


def test_tokens_that_spell_the_same_bytes_keep_their_rows_in_embedding_and_head(tmp_path, kind):
    path = folder_of(tmp_path, kind)
    before, after = AutoModelForCausalLM.from_pretrained(path), student(path, UNIGRAM).load()
    old, new = Spelling(open_tokenizer(OLD)), Spelling(open_tokenizer(UNIGRAM))
    both = [(new.pieces.index(b), old.pieces.index(b)) for b in (b" ", b"\n", b"return", b"e") if b in new.pieces]
    assert len(both) > 2
    for ours, theirs in both:
        for one, other in zip(weights_of(after), weights_of(before), strict=True):
            assert torch.equal(one[ours], other[theirs])


def weights_of(model) -> list[torch.Tensor]:
    head = model.get_output_embeddings()
    found = [model.get_input_embeddings().weight, head.weight, head.bias]
    return [weight for weight in found if weight is not None]


def test_a_tied_head_stays_tied_and_a_free_one_free(tmp_path, kind):
    model = student(folder_of(tmp_path, kind), BYTES).load()
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == (kind == "tied")
    assert len(model.get_input_embeddings().weight) == model.config.vocab_size == 260


def test_every_byte_has_the_row_of_the_token_that_is_this_byte(tmp_path):
    path = folder_of(tmp_path, "tied")
    old, new = Spelling(open_tokenizer(OLD)), Spelling(open_tokenizer(BYTES))
    before = AutoModelForCausalLM.from_pretrained(path).get_input_embeddings().weight
    after = student(path, BYTES).load().get_input_embeddings().weight
    for byte in range(256):
        piece = bytes([byte])
        assert torch.equal(after[new.pieces.index(piece)], before[old.pieces.index(piece)])


def test_special_tokens_are_matched_by_their_name_or_else_their_role():
    old, unigram, byte = (open_tokenizer(given) for given in (OLD, UNIGRAM, BYTES))
    turn = "<|im_end|>"
    assert token_rows(byte, old, 512).partners[byte.vocab[turn]] == old.vocab[turn]
    assert unigram.eos_token != old.eos_token
    partners = token_rows(unigram, old, 512).partners
    assert partners[unigram.eos_token_id] == old.eos_token_id
    assert partners[unigram.pad_token_id] == old.pad_token_id
    unigram.bos_token = unigram.unk_token
    begin = token_rows(unigram, old, 512).partners[unigram.bos_token_id]
    assert begin == old.eos_token_id  # what stands before a text where nothing else does
    unigram.pad_token = unigram.eos_token
    assert token_rows(unigram, old, 512).partners[unigram.eos_token_id] == old.eos_token_id


def test_a_token_that_none_spells_is_the_mean_of_those_it_was_split_into():
    old, new, weight = open_tokenizer(BYTES), open_tokenizer(OLD), torch.randn(260, 8)
    rows, spelling = token_rows(new, old, 260), Spelling(new)
    number = next(i for i, piece in enumerate(spelling.pieces) if piece and len(piece) == 3 and i > 3)
    piece = spelling.pieces[number] or b""
    expected = weight[[Spelling(old).pieces.index(bytes([byte])) for byte in piece]].mean(0)
    torch.testing.assert_close(rows.of(weight)[number], expected)


def test_rows_of_padding_are_in_no_mixture(tmp_path):
    path = folder_of(tmp_path, "untied", vocab_size=544)
    model = AutoModelForCausalLM.from_pretrained(path)
    for weight in weights_of(model):
        weight.data[512:] = torch.nan
    model.save_pretrained(path)
    new = student(path, UNIGRAM).load()
    assert all(weight.isfinite().all() for weight in weights_of(new))


def test_the_exported_folder_opens_and_generates_without_kdlm(tmp_path, kind):
    section = student(folder_of(tmp_path / "old", kind), BYTES)
    model = section.load()
    model.save_pretrained(tmp_path / "new")
    section.tokenizer().save_pretrained(tmp_path / "new")
    opened, tokenizer = (c.from_pretrained(tmp_path / "new") for c in (AutoModelForCausalLM, AutoTokenizer))
    prompt = tokenizer("def f(é):", return_tensors="pt")
    assert prompt["input_ids"].shape[1] == len("def f(é):".encode())
    written = opened.generate(**prompt, max_new_tokens=4, do_sample=False)
    assert torch.equal(opened(written).logits, model(written).logits)
    assert (opened.config.eos_token_id, opened.config.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert not hasattr(opened.config, "auto_map")


def test_what_ended_a_text_ends_it_and_how_to_sample_stays(tmp_path):
    path = folder_of(tmp_path, "untied")
    model, old, new = AutoModelForCausalLM.from_pretrained(path), open_tokenizer(OLD), open_tokenizer(BYTES)
    turn = "<|im_end|>"
    model.generation_config.update(
        do_sample=True, top_k=7, max_new_tokens=9, eos_token_id=[old.vocab[turn], old.eos_token_id], suppress_tokens=[5]
    )
    model.save_pretrained(path)
    found = student(path, BYTES).load().generation_config
    assert (found.top_k, found.max_new_tokens, found.suppress_tokens) == (7, 9, None)
    assert found.eos_token_id == sorted([new.eos_token_id, new.vocab[turn]])


def test_the_row_of_padding_alone_gets_no_gradient(tmp_path):
    model, new = student(folder_of(tmp_path, "untied"), UNIGRAM).load(), open_tokenizer(UNIGRAM)
    assert new.pad_token_id != 1  # the old one
    model(torch.tensor([[new.pad_token_id, 1, 2, 3]])).logits.sum().backward()
    gradient = model.get_input_embeddings().weight.grad.norm(dim=-1)
    assert gradient[new.pad_token_id] == 0 and gradient[[1, 2, 3]].gt(0).all()


def test_positions_are_raised_where_they_are_rotations_and_nowhere_else(tmp_path):
    path = folder_of(tmp_path / "rope", "untied", max_position_embeddings=64)
    section = student(path, BYTES, max_position_embeddings=256)
    assert section.config().max_position_embeddings == section.load().config.max_position_embeddings == 256
    GPT2LMHeadModel(GPT2Config(vocab_size=512, n_embd=16, n_layer=1, n_head=2)).save_pretrained(tmp_path / "table")
    open_tokenizer(OLD).save_pretrained(tmp_path / "table")
    with pytest.raises(ValueError, match=r"max_position_embeddings: .* has a table of positions"):
        student(tmp_path / "table", BYTES, max_position_embeddings=4096).config()


def test_a_second_table_of_tokens_is_refused(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder_of(tmp_path, "untied"))
    model.model.embed_tokens_per_layer = torch.nn.Embedding(512, 4)
    rows = token_rows(open_tokenizer(BYTES), open_tokenizer(OLD), 512)
    with pytest.raises(ValueError, match="embed_tokens_per_layer too: not supported"):
        retokenise(model, rows, open_tokenizer(BYTES))


def test_an_unknown_tokenizer_of_the_sandbox_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"student.tokenizer_from: the sandbox has no tokenizer 'code-tokenizer-byte'"):
        student(tmp_path, "sandbox:code-tokenizer-byte").tokenizer()
