"""Batches keep their contract, and a model answers alike in every layout: no sequence sees another."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from kdlm.data import Collator
from kdlm.data.packing import packed_row

LENGTHS = [5, 1, 7, 3, 2]


def sequences():
    rows = []
    for number, length in enumerate(LENGTHS):
        ids = torch.randint(1, 50, (length,)).tolist()
        rows.append({"input_ids": ids, "labels": [-100, *ids[1:]], "length": length, "index": number})
    return rows


def test_a_padded_batch_is_padded_on_the_right():
    rows = sequences()
    batch = Collator(pad_id=0)(rows)
    assert batch.keys() == {"input_ids", "labels", "attention_mask", "index"}
    assert {values.dtype for values in batch.values()} == {torch.int64}
    assert batch["input_ids"].shape == (5, 7)
    for number, row in enumerate(rows):
        size = len(row["input_ids"])
        assert batch["input_ids"][number].tolist() == row["input_ids"] + [0] * (7 - size)
        assert batch["labels"][number].tolist() == row["labels"] + [-100] * (7 - size)
        assert batch["attention_mask"][number].tolist() == [1] * size + [0] * (7 - size)
    assert batch["index"].tolist() == [0, 1, 2, 3, 4]


def test_a_padded_length_is_rounded_up():
    assert Collator(0, pad_to_multiple_of=4)(sequences())["input_ids"].shape == (5, 8)
    with pytest.raises(ValueError, match="means nothing without padding"):
        Collator(0, "padding_free", pad_to_multiple_of=4)


def test_a_padding_free_batch_is_one_row_whose_positions_restart():
    rows = sequences()
    batch = Collator(0, "padding_free")(rows)
    assert batch.keys() == {"input_ids", "labels", "position_ids", "index"}
    assert batch["input_ids"].tolist() == [[token for row in rows for token in row["input_ids"]]]
    assert batch["position_ids"].tolist() == [[at for length in LENGTHS for at in range(length)]]
    assert (batch["labels"][batch["position_ids"] == 0] == -100).all()


def test_packed_rows_make_the_same_batch_as_their_sequences():
    rows, collate = sequences(), Collator(0, "padding_free")
    loose, packed = collate(rows), collate([packed_row(rows[:3]), packed_row(rows[3:])])
    assert all(torch.equal(loose[key], packed[key]) for key in loose)
    with pytest.raises(ValueError, match="cannot be padded apart"):
        Collator(0)([packed_row(rows)])


def test_the_first_token_of_a_sequence_is_never_a_label():
    rows = [{"input_ids": [5, 6], "labels": [5, 6]}, {"input_ids": [7, 8], "labels": [7, 8]}]
    assert Collator(0)(rows)["labels"].tolist() == [[-100, 6], [-100, 8]]
    assert Collator(0, "padding_free")(rows)["labels"].tolist() == [[-100, 6, -100, 8]]


SIZES = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}


def kept_logits(model, batch):
    """Logits at real tokens, in the order of the sequences."""
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    inputs = {key: value for key, value in batch.items() if key not in ("labels", "index")}
    return model(**inputs, use_cache=False).logits[mask]


@pytest.mark.parametrize("mode", ["eval", "train", "gradient checkpointing"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", [(LlamaConfig, LlamaForCausalLM), (Qwen3Config, Qwen3ForCausalLM)])
def test_a_model_gives_the_same_logits_and_gradients_in_every_layout(family, attention, mode):
    config, build = family
    model = build(config(**SIZES, **HEADS, attn_implementation=attention)).double().train(mode != "eval")
    if mode == "gradient checkpointing":
        # the older name warns where the newer one exists
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    rows = sequences()
    batches = [
        Collator(0)(rows),
        Collator(0, "padding_free")(rows),
        Collator(0, "padding_free")([packed_row(rows[:2]), packed_row(rows[2:])]),
    ]
    found = []
    for batch in batches:
        model.zero_grad()
        logits = kept_logits(model, batch)
        logits.square().sum().backward()
        found.append((logits.detach(), model.model.layers[0].self_attn.q_proj.weight.grad.clone()))
    alone = torch.cat([kept_logits(model, Collator(0)([row])) for row in rows]).detach()
    for logits, gradient in found:  # eager attention takes its softmax in fp32 whatever the model's dtype
        torch.testing.assert_close(logits, alone, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(gradient, found[0][1], rtol=1e-5, atol=1e-6)


def test_a_cache_lets_sequences_see_each_other():
    """Why every forward on a padding-free batch says use_cache=False: transformers then looks at the position ids."""
    model = LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS)).eval()
    batch = Collator(0, "padding_free")(sequences())
    inputs = {key: batch[key] for key in ("input_ids", "position_ids")}
    apart, mixed = model(**inputs, use_cache=False).logits, model(**inputs, use_cache=True).logits
    assert torch.allclose(apart[:, : LENGTHS[0]], mixed[:, : LENGTHS[0]], atol=1e-5)
    assert not torch.allclose(apart, mixed, atol=1e-5)
