"""Queries, keys and values are the model's own: they give its attention, in every known layout of projections."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertConfig,
    DistilBertConfig,
    ElectraConfig,
    EuroBertConfig,
    GPT2Config,
    LlamaConfig,
    ModernBertConfig,
    Phi3Config,
    Qwen3Config,
)

from kdlm.losses import Apart, kept_rows, real_rows
from kdlm.models import Ask, Lora, Predictor, TextClassifier, adapt, view
from kdlm.models.hybrids import hybrid
from kdlm.models.inside import Projections, stack_of
from kdlm.teachers import LocalTeacher

SIZES = {"vocab_size": 37, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4, "pad_token_id": 0}
FEED = {**SIZES, "intermediate_size": 32}
NO_DROP = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.4}
ENDS = {"cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 1, "eos_token_id": 2}
MODELS = {
    "llama": (AutoModelForCausalLM, LlamaConfig(**FEED, num_key_value_heads=2, initializer_range=0.4)),
    "phi3": (AutoModelForCausalLM, Phi3Config(**FEED, num_key_value_heads=2, initializer_range=0.4)),
    "turned in part": (
        AutoModelForCausalLM,
        Phi3Config(
            **{**FEED, "hidden_size": 32, "partial_rotary_factor": 0.5}, num_key_value_heads=2, initializer_range=0.4
        ),
    ),
    "gpt2": (
        AutoModelForCausalLM,
        GPT2Config(vocab_size=37, n_embd=16, n_layer=3, n_head=4, n_positions=32, initializer_range=0.4),
    ),
    "bert": (AutoModelForMaskedLM, BertConfig(**FEED, **NO_DROP)),
    "electra": (AutoModelForMaskedLM, ElectraConfig(**FEED, **NO_DROP, embedding_size=8)),
    "distilbert": (
        AutoModelForMaskedLM,
        DistilBertConfig(vocab_size=37, dim=16, n_layers=3, n_heads=4, hidden_dim=32, initializer_range=0.4),
    ),
    "eurobert": (AutoModelForMaskedLM, EuroBertConfig(**FEED, num_key_value_heads=2, initializer_range=0.4)),
    "modernbert": (AutoModelForMaskedLM, ModernBertConfig(**FEED, **ENDS, initializer_range=0.4)),
}


@pytest.fixture(params=MODELS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def made(name: str) -> Any:
    torch.manual_seed(0)
    auto, config = MODELS[name]
    return auto.from_config(config, attn_implementation="eager").double().eval()


def batch() -> dict[str, Tensor]:
    ids = torch.randint(3, 37, (2, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def attention(found: Projections, rows: Any, read: dict[str, Tensor], causal: bool) -> Tensor:
    apart = Apart.of(read, rows)
    q, k = (apart.heads(x, n) for x, n in zip(found.scored, (found.heads, found.kv_heads), strict=True))
    scores = q @ k.repeat_interleave(found.heads // found.kv_heads, 1).transpose(-1, -2) / q.shape[-1] ** 0.5
    seen = apart.real[:, None, None, :].expand_as(scores)
    return scores.masked_fill(~(seen.tril() if causal else seen), -torch.inf).softmax(-1)


def test_queries_and_keys_give_the_models_own_attention(name: str) -> None:
    """Learned positions are in the embeddings, rotary ones turn queries and keys, whole heads or a part of each."""
    model, read = made(name), batch()
    reader, rows = Predictor(model), real_rows(read)
    signal, inside = reader.inside(read, rows, Ask(attention=(0, 2)))
    inputs = {key: read[key] for key in read if key != "labels"}
    own = model(**inputs, output_attentions=True).attentions
    assert signal is None
    for found, layer in zip(inside.attention, (0, 2), strict=True):
        ours, real = attention(found, rows, read, reader.causal), read["attention_mask"].bool()
        for row in range(2):  # of the query that padding is, a model may make anything
            size = int(real[row].sum())
            torch.testing.assert_close(ours[row, :, :size, :size], own[layer][row, :, :size, :size])


def test_the_direction_is_known(name: str) -> None:
    assert Predictor(made(name)).causal == (name in ("llama", "phi3", "turned in part", "gpt2"))


def test_embeddings_and_layers_are_the_models_hidden_states(name: str) -> None:
    model, read = made(name), batch()
    rows = real_rows(read)
    own = model(input_ids=read["input_ids"], attention_mask=read["attention_mask"], output_hidden_states=True)
    _, inside = Predictor(model).inside(read, rows, Ask(layers=(0, 1), embeddings=True))
    torch.testing.assert_close(inside.embeddings, rows.select(own.hidden_states[0]))
    for found, state in zip(inside.hidden, own.hidden_states[1:], strict=False):
        torch.testing.assert_close(found, rows.select(state))


def test_layers_above_the_asked_ones_are_not_run_and_come_back(name: str) -> None:
    model, read = made(name), batch()
    owner, stack = stack_of(model.base_model)
    layers, run = getattr(owner, stack), []
    for number, layer in enumerate(layers):
        layer.register_forward_hook(lambda *_, number=number: run.append(number))
    reader, rows = Predictor(model), real_rows(read)
    run.clear()
    _, short = reader.inside(read, rows, Ask(attention=(0,)))
    assert run == [0]
    run.clear()
    signal, whole = reader.inside(read, rows, Ask(attention=(0,)), rows)
    assert run == [0, 1, 2] and signal is not None
    assert getattr(owner, stack) is layers
    torch.testing.assert_close(short.attention[0].v, whole.attention[0].v)


def test_a_gradient_reaches_no_layer_above_the_asked_one(name: str) -> None:
    model, read = made(name), batch()
    _, inside = Predictor(model).inside(read, real_rows(read), Ask(layers=(1,), attention=(1,)), real_rows(read))
    (inside.hidden[0].sum() + inside.attention[0].q.sum()).backward()
    owner, stack = stack_of(model.base_model)
    reached = [any(p.grad is not None for p in layer.parameters()) for layer in getattr(owner, stack)]
    assert reached == [True, True, False]


def test_a_frozen_teacher_answers_alike_and_without_a_graph() -> None:
    model, read = made("llama"), batch()
    rows, kept = real_rows(read), kept_rows(read["labels"])
    ask = Ask(layers=(2,), attention=(1,), embeddings=True)
    _, own = Predictor(model).inside(read, rows, ask)
    signal, found = LocalTeacher(model).inside(read, rows, ask, kept)
    assert signal is not None and not found.hidden[0].requires_grad and not found.attention[0].k.requires_grad
    torch.testing.assert_close(found.attention[0].k, own.attention[0].k)
    torch.testing.assert_close(found.embeddings, own.embeddings)


def test_adapters_on_projections_are_seen() -> None:
    torch.manual_seed(0)
    auto, config = MODELS["llama"]
    adapted = adapt(auto.from_config(config), Lora(rank=4)).eval()
    read = batch()
    before = Predictor(adapted).inside(read, real_rows(read), Ask(attention=(0,)))[1].attention[0].q
    for key, parameter in adapted.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(parameter)
    after = Predictor(adapted).inside(read, real_rows(read), Ask(attention=(0,)))[1].attention[0].q
    assert (before - after).abs().max() > 1e-3


def test_gradient_checkpointing_changes_nothing() -> None:
    read, grads = batch(), []
    for saving in (False, True):
        model = made("llama").train()
        if saving:
            model.activation_checkpointing_enable()
        _, inside = Predictor(model).inside(read, real_rows(read), Ask(layers=(1,), attention=(1,)))
        (inside.hidden[0].square().sum() + inside.attention[0].q.square().sum()).backward()
        grads.append(model.model.layers[0].mlp.up_proj.weight.grad)
    torch.testing.assert_close(grads[0], grads[1])


@pytest.mark.parametrize("name", ["bert", "eurobert", "modernbert", "llama"])
def test_a_classifier_of_texts_is_read_likewise(name: str) -> None:
    torch.manual_seed(0)
    config = MODELS[name][1].__class__(**{**MODELS[name][1].to_dict(), "num_labels": 3})
    model = AutoModelForSequenceClassification.from_config(config).double().eval()
    read, reader = batch(), view(model)
    assert isinstance(reader, TextClassifier) and reader.num_classes == 3 and reader.num_layers == 3
    signal, inside = reader.inside(read, real_rows(read), Ask(layers=(1,)), real_rows(read))
    inputs = {key: read[key] for key in ("input_ids", "attention_mask")}
    assert signal is not None
    torch.testing.assert_close(signal.logits, model(**inputs).logits)
    nothing, again = reader.inside(read, real_rows(read), Ask(layers=(1,)))
    assert nothing is None
    torch.testing.assert_close(inside.hidden[0], again.hidden[0])


def test_what_cannot_be_had_is_said() -> None:
    reader, read = Predictor(made("llama")), batch()
    with pytest.raises(ValueError, match=r"layers \[3\] were asked of a model of 3"):
        reader.inside(read, real_rows(read), Ask(layers=(3,)))
    del reader.module.model.layers[0].self_attn
    with pytest.raises(ValueError, match="no projections of queries, keys and values"):
        reader.inside(read, real_rows(read), Ask(attention=(0,)))


def test_a_model_whose_first_layer_is_no_attention_is_causal_too_and_gated_queries_are_refused() -> None:
    source = AutoModelForCausalLM.from_config(Qwen3Config(**FEED, num_key_value_heads=2, head_dim=4)).eval()
    student = Predictor(hybrid(source, [0, 1]))
    assert student.causal
    with pytest.raises(ValueError, match="layer 2: its projection gives 32 numbers for 4 heads of 4"):
        student.inside(batch(), real_rows(batch()), Ask(attention=(2,)))


def test_checkpointing_that_runs_layers_without_a_graph_is_refused_where_one_is_read_inside() -> None:
    model = AutoModelForCausalLM.from_config(LlamaConfig(**FEED)).train()
    rows, student = real_rows(batch()), Predictor(model)
    model.activation_checkpointing_enable({"use_reentrant": False})
    _, inside = student.inside(batch(), rows, Ask(attention=(0,)), rows)
    inside.attention[0].q.sum().backward()
    assert model.model.layers[0].self_attn.q_proj.weight.grad is not None
    model.activation_checkpointing_enable({"use_reentrant": True})
    student.inside(batch(), rows, Ask(layers=(0,)), rows)
    with pytest.raises(ValueError, match="use_reentrant: true runs layers without a graph"):
        student.inside(batch(), rows, Ask(attention=(0,)), rows)
