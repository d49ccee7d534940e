"""Laws of what `kdlm plan` foresees."""

import time
from dataclasses import replace

import pytest
import torch
from recipes_to_plan import CPU, GPU, SMALL, folder, recipe
from transformers import LlamaConfig, LlamaForCausalLM

from kdlm.plan import advise, changed, enough, predict


def parts(found):
    return {name: size for name, size in found.parts.items() if size}


def weights_of(**sizes):
    config = LlamaConfig(**{"vocab_size": 1000, **SMALL, **sizes})
    with torch.device("meta"):
        return sum(p.numel() for p in LlamaForCausalLM(config).parameters())


def test_the_parts_add_up_to_the_total_and_the_peak_is_the_largest_phase(tmp_path):
    found = predict(recipe(tmp_path), CPU)
    assert sum(found.parts.values()) == found.total
    assert found.tensors == max(sum(phase.values()) for phase in found.phases.values())


def test_weights_gradients_and_state_are_counted_by_the_byte(tmp_path):
    found = predict(recipe(tmp_path), CPU).phases["optimiser step"]
    count, inverse_frequencies = weights_of(), 2 * 8 * 4  # and the copy that dynamic scaling of positions goes back to
    assert found["weights"] == pytest.approx(4 * count, abs=2 * inverse_frequencies)
    assert found["gradients"] == 4 * count
    assert found["optimiser"] == pytest.approx(8 * count, rel=0.01)  # and a count of steps for each tensor
    assert found["teacher weights"] == pytest.approx(4 * weights_of(hidden_size=96), rel=0.01)


def test_masks_of_a_sparse_student_take_a_byte_for_each_weight_of_its_linear_layers(tmp_path):
    dense, sparse = (predict(recipe(tmp_path, {"sparsity": one}), CPU) for one in (None, {"share": 0.5}))
    sizes = {name: one.phases["optimiser step"]["weights"] for name, one in (("dense", dense), ("sparse", sparse))}
    assert sizes["sparse"] - sizes["dense"] == 2 * (4 * 64 * 64 + 3 * 64 * 128)


@pytest.mark.parametrize("key", ["training.per_device_train_batch_size", "data.max_length", "layers"])
def test_more_of_it_takes_more_memory_and_time(tmp_path, key):
    least = None
    for value in (2, 4, 8):
        given = recipe(tmp_path, num_hidden_layers=value) if key == "layers" else recipe(tmp_path, {key: 16 * value})
        found = predict(given, CPU)
        if least is not None:
            assert found.tensors > least.tensors
            assert found.flops > least.flops
        least = found


def test_adapters_alone_have_gradients_and_state(tmp_path):
    rank = 4
    found = predict(recipe(tmp_path, {"student.lora": {"rank": rank}}), CPU).phases["optimiser step"]
    width, inner, layers = 64, 128, 2
    adapters = layers * rank * (4 * 2 * width + 3 * (width + inner))
    assert found["gradients"] == 4 * adapters
    assert found["optimiser"] == pytest.approx(8 * adapters, rel=0.05)


def test_forgetting_is_measured_with_a_copy_of_the_student_but_of_adapters_with_their_base(tmp_path):
    watched = {"evaluation": {"start": True}}
    for more, copies in (({}, 1), ({"student.lora": {"rank": 4}}, 0)):
        plain, with_start = (predict(recipe(tmp_path, {**more, **each}), CPU) for each in ({}, watched))
        assert with_start.parts["weights"] - plain.parts["weights"] == pytest.approx(copies * 4 * weights_of(), abs=256)


def test_checkpointing_keeps_fewer_activations_and_computes_more(tmp_path):
    long = {"data.max_length": 512}
    plain = predict(recipe(tmp_path, long, num_hidden_layers=8), CPU)
    saved = predict(recipe(tmp_path, long | {"training.gradient_checkpointing": True}, num_hidden_layers=8), CPU)
    assert saved.phases["loss"]["activations"] < plain.phases["loss"]["activations"] / 4
    assert saved.flops > 1.1 * plain.flops


def test_chunks_bound_the_losses_part(tmp_path):
    few, many = ({"method.chunk_rows": rows, "training.per_device_train_batch_size": 16} for rows in (64, 1024))
    bounded, whole = (predict(recipe(tmp_path, of, vocab_size=8000), CPU).phases["loss"]["loss"] for of in (few, many))
    both = 960 * (8000 + 1000) * 4  # logits of 960 rows more; a block's temporaries are the same
    assert whole - bounded == pytest.approx(both, rel=0.1)


def test_accumulation_keeps_gradients_through_the_step(tmp_path):
    once = predict(recipe(tmp_path), CPU)
    twice = predict(recipe(tmp_path, {"training.gradient_accumulation_steps": 2}), CPU)
    assert once.phases["loss"]["gradients"] == 0
    assert twice.phases["loss"]["gradients"] == once.phases["optimiser step"]["gradients"]
    assert twice.tokens == 2 * once.tokens


def test_a_cached_teacher_has_signals_and_no_weights(tmp_path):
    of = {"name": "local", "path": str(tmp_path / "teacher")}
    cached = {"name": "cached", "path": "nowhere", "of": of, "format": {"name": "top_k", "k": 16}}
    found = parts(predict(recipe(tmp_path, {"teacher": cached}), CPU))
    assert "teacher weights" not in found
    assert found["cache"] == 2 * 4 * 64 * (16 * 12 + 4)  # two batches of ids, log-probabilities and the tail


def test_a_teacher_in_4_bits_is_its_head_and_an_eighth_of_the_rest(tmp_path):
    plain = recipe(tmp_path, {"teacher.dtype": "bfloat16"})
    quantised = changed(plain, {"teacher.quantization": "4bit"})
    whole, small = (predict(one, GPU).phases["loss"]["teacher weights"] for one in (plain, quantised))
    linear = 2 * (4 * 96 * 96 + 3 * 96 * 128)
    assert whole - small == pytest.approx(2 * linear * (1 - 4.127 / 16), rel=0.01)


def test_a_student_of_few_bits_keeps_its_weights_rounded_and_where_they_stay_inside(tmp_path):
    pytest.importorskip("torchao")
    plain = recipe(tmp_path, {"training.bf16": False})
    few = changed(plain, {"student.quantization_aware": {"bits": 4, "group_size": 32}})
    one, other = (predict(each, CPU).phases["loss"]["activations"] for each in (plain, few))
    linear = 2 * (4 * 64 * 64 + 3 * 64 * 128)
    assert other - one == pytest.approx(2 * 4 * linear, rel=0.1)  # a pass keeps two numbers for each weight


def test_a_quantised_student_has_the_rest_of_its_weights_in_float32_as_peft_casts_them(tmp_path):
    pytest.importorskip("bitsandbytes")
    student = {"name": "pretrained", "path": folder(tmp_path / "whole"), "dtype": "bfloat16", "lora": {"rank": 1}}
    plain = recipe(tmp_path, {"student": student})
    small = changed(plain, {"student.quantization": "4bit"})
    one, other = (predict(each, CPU).phases["loss"]["weights"] for each in (plain, small))
    linear, rest = 2 * (4 * 64 * 64 + 3 * 64 * 128), 2 * 1000 * 64 + 5 * 64
    assert one - other == pytest.approx(2 * linear * (1 - 4.127 / 16) - 2 * rest, abs=1000)


def test_own_text_needs_a_cache_of_keys_and_values(tmp_path):
    own = {
        "method": {"name": "gkd", "student_share": 1.0},
        "rollouts": {"engine": {"name": "generate", "batch_size": 2}, "sampling": {"max_new_tokens": 100}},
    }
    found = predict(recipe(tmp_path, own), CPU)
    keys_and_values = 2 * 2 * 64 * 4 * 2 * 164
    assert found.phases["rollouts"]["rollouts"] > keys_and_values
    assert found.seconds is not None and found.seconds["rollouts"] > 0


def test_mixed_precision_on_a_gpu_casts_weights_and_halves_activations(tmp_path):
    wide = predict(recipe(tmp_path, {"training.bf16": False}), GPU)
    mixed = predict(recipe(tmp_path), GPU)
    assert mixed.settings.autocast == torch.bfloat16
    assert mixed.phases["student forward"]["activations"] < wide.phases["student forward"]["activations"]
    assert mixed.step_seconds < wide.step_seconds


@pytest.mark.parametrize(("optim", "bytes_of_state"), [("sgd", 0), ("adamw_torch", 8), ("adamw_bnb_8bit", 2)])
def test_optimisers_hold_what_they_hold(tmp_path, optim, bytes_of_state):
    found = predict(recipe(tmp_path, {"training.optim": optim}), GPU).phases["loss"]["optimiser"]
    assert found == pytest.approx(bytes_of_state * weights_of(), rel=0.05, abs=100)


def test_a_model_of_70_billion_weights_is_planned_without_them(tmp_path):
    large = {
        **{"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
        **{"num_key_value_heads": 8, "vocab_size": 128256},
    }
    teacher = {"name": "local", "path": folder(tmp_path / "large", **large), "dtype": "bfloat16"}
    given = recipe(tmp_path, {"teacher": teacher}, vocab_size=128256)
    started = time.process_time()
    found = predict(given, replace(GPU, memory=160 * 2**30))
    assert time.process_time() - started < 20
    assert found.parts["teacher weights"] == pytest.approx(2 * weights_of(**large), rel=1e-5)
    assert found.fits


def test_every_advice_saves_what_it_says_and_together_they_may_do(tmp_path):
    given = recipe(tmp_path, {"data.max_length": 512, "training.bf16": False})
    now = predict(given, replace(GPU, memory=10**7))
    advice = advise(given, now)
    assert len(advice) >= 5
    for one in advice:
        then = predict(changed(given, one.changes), now.device)
        assert now.total - then.total == one.saves > 0
    together, then = enough(given, replace(GPU, memory=now.total - 2**20), advice)
    assert then is not None and then.total < now.total
    assert set(together) <= {key for one in advice for key in one.changes}


def test_one_sequence_alone_needs_no_mask_and_several_do(tmp_path):
    one, two = (
        predict(
            recipe(tmp_path, {"data.max_length": 2048 // batch, "training.per_device_train_batch_size": batch}), CPU
        )
        for batch in (1, 2)
    )
    masks = 2 * 2 * 1024**2 * 4  # of two layers, in fp32
    more = two.phases["student forward"]["activations"] - one.phases["student forward"]["activations"]
    assert more == pytest.approx(masks, rel=0.35)


def test_a_pair_is_two_sequences(tmp_path):
    alone = {"teacher": None, "losses": [], "method": {"name": "sequence_kd"}}
    pairs = parts(predict(recipe(tmp_path, alone | {"method": {"name": "redi"}}), GPU))
    texts = parts(predict(recipe(tmp_path, alone | {"training.per_device_train_batch_size": 8}), GPU))
    assert pairs["activations"] >= texts["activations"]


def test_tasks_side_by_side_take_what_one_takes(tmp_path):
    alone = {"teacher": None, "losses": []}
    tasks, texts = (
        predict(recipe(tmp_path, alone | {"method": {"name": name}}), GPU).phases["loss"]
        for name in ("step_by_step", "sequence_kd")
    )
    assert tasks == pytest.approx(texts, rel=0.01)
