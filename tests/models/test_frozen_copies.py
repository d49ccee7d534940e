"""A frozen copy is in float32 what its network is when it moves: plain, adapters merged, whatever their factors are."""

import copy
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from kdlm.diffusion import ResidualDenoiser
from kdlm.models import FrozenCopy, Lora, Predictor, adapt, merge, view

SIZES = {
    "vocab_size": 37, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
KINDS = {
    "lora": Lora(rank=2),
    "dora": Lora(rank=2, dora=True),
    "trained in full": Lora(rank=2, modules_to_save=["lm_head", "embed_tokens"]),
    "embedding": Lora(rank=2, target_modules=["embed_tokens", "q_proj"]),
    "embedding, dora": Lora(rank=2, target_modules=["embed_tokens", "down_proj"], dora=True),
}
IDS = torch.arange(3, 15)[None]


def student(lora: Lora | None = None, tied: bool = False):
    torch.manual_seed(0)
    if tied:
        plain = Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=8, tie_word_embeddings=True))
    else:
        plain = LlamaForCausalLM(LlamaConfig(**SIZES))
    return (plain if lora is None else adapt(plain, lora)).eval()


@torch.no_grad()
def wander(model, seed: int = 1) -> None:
    """Change everything that trains."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)


def weights(module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in module.named_parameters()}


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_of_adapters_is_the_plain_model_that_peft_merges(kind: str) -> None:
    model = student(KINDS[kind])
    wander(model)
    ours = FrozenCopy(model).module
    assert type(ours) is LlamaForCausalLM and not any("lora" in name for name, _ in ours.named_parameters())
    torch.testing.assert_close(ours(input_ids=IDS).logits, model(input_ids=IDS).logits, rtol=1e-5, atol=1e-5)
    expected = weights(merge(copy.deepcopy(model)))
    assert weights(ours).keys() == expected.keys()
    for name, value in weights(ours).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_an_average_is_that_of_the_merged_weights(kind: str) -> None:
    model = student(KINDS[kind])
    average = FrozenCopy(model)
    expected = weights(average.module)
    for seed in range(3):
        wander(model, seed)
        average.move(0.8)
        now = weights(merge(copy.deepcopy(model)))
        expected = {name: 0.8 * value + 0.2 * now[name] for name, value in expected.items()}
    for name, value in weights(average.module).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dora", [False, True])
def test_an_average_does_not_depend_on_how_an_update_is_split_into_factors(dora: bool) -> None:
    """A -> c A and B -> B / c change no answer; c is a power of two, so not even a rounding changes."""
    one, other = (student(Lora(rank=2, dora=dora)) for _ in range(2))
    averages = [FrozenCopy(model) for model in (one, other)]
    for seed, scale in enumerate((8.0, 0.25, -2.0)):
        for model in (one, other):
            wander(model, seed)
        with torch.no_grad():
            for name, parameter in other.named_parameters():
                if "lora_A" in name or "lora_B" in name:
                    parameter *= scale if "lora_A" in name else 1 / scale
            for average in averages:
                average.move(0.5)
            for name, parameter in other.named_parameters():  # back, or the next wandering would differ
                if "lora_A" in name or "lora_B" in name:
                    parameter /= scale if "lora_A" in name else 1 / scale
    ours, theirs = (weights(average.module) for average in averages)
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


def test_what_does_not_train_is_not_read_again() -> None:
    plain = student()
    plain.model.layers[0].requires_grad_(False)
    for model, reads in ((plain, 3 + 9), (student(Lora(rank=2, target_modules=["q_proj"])), 2)):
        average = FrozenCopy(model)
        assert len(average.reads) == reads
        before = {name: value._version for name, value in average.module.named_parameters()}
        average.move(0.5)
        touched = {name for name, value in average.module.named_parameters() if value._version != before[name]}
        assert touched == average.reads.keys()


def test_a_role_that_rests_while_a_snapshot_is_taken_is_copied_all_the_same() -> None:
    model = student()
    snapshot = FrozenCopy(model)
    wander(model)
    model.requires_grad_(False)
    snapshot.move(0.0)
    assert all(torch.equal(value, weights(model)[name]) for name, value in weights(snapshot.module).items())


def test_a_snapshot_of_an_average_follows_it() -> None:
    model = student(Lora(rank=2))
    average = FrozenCopy(model)
    snapshot = FrozenCopy(average)
    assert snapshot.reads.keys() == average.reads.keys()
    wander(model)
    average.move(0.5)
    assert any(not torch.equal(value, weights(average.module)[n]) for n, value in weights(snapshot.module).items())
    snapshot.move(0.0)
    assert all(torch.equal(value, weights(average.module)[n]) for n, value in weights(snapshot.module).items())


@pytest.mark.parametrize(
    "lora", [Lora(rank=2), Lora(rank=2, modules_to_save=["embed_tokens"])], ids=["frozen", "trained in full"]
)
def test_head_and_embedding_of_a_copy_are_tied_as_the_students(lora: Lora, tmp_path: Path) -> None:
    model = student(lora, tied=True)
    average = FrozenCopy(model)
    wander(model)
    average.move(0.0)
    assert average.module.lm_head.weight is average.module.model.embed_tokens.weight
    torch.testing.assert_close(average.module(input_ids=IDS).logits, model(input_ids=IDS).logits)
    average.module.save_pretrained(tmp_path)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(opened(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_an_adapter_on_one_of_two_tied_weights_unties_them_in_the_copy(tmp_path: Path) -> None:
    with pytest.warns(UserWarning):  # peft's, of what its own merging would do
        model = student(Lora(rank=2, target_modules=["embed_tokens"]), tied=True)
    wander(model)
    FrozenCopy(model).module.save_pretrained(tmp_path)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(opened(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_small_updates_of_a_bf16_base_are_not_rounded_away() -> None:
    model = student(Lora(rank=2)).to(torch.bfloat16)
    before = weights(FrozenCopy(model).module)["model.layers.0.mlp.up_proj.weight"]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.float().fill_(0)
                parameter.data = torch.full_like(parameter, 1e-6, dtype=torch.float32)
            elif "lora_A" in name:
                parameter.data = parameter.float()
    moved = weights(FrozenCopy(model).module)["model.layers.0.mlp.up_proj.weight"]
    assert moved.dtype == torch.float32 and (moved != before).float().mean() > 0.9


def test_a_copy_is_seen_by_methods_as_any_language_model() -> None:
    model = student(Lora(rank=2))
    assert isinstance(seen := view(FrozenCopy(model).module), Predictor) and seen.reads_hidden


def test_a_denoiser_with_adapters_is_averaged_as_its_merged_self() -> None:
    torch.manual_seed(0)
    model = adapt(ResidualDenoiser((2,), width=16, depth=1), Lora(rank=2))
    average = FrozenCopy(model)
    wander(model)
    average.move(0.0)
    expected = weights(merge(copy.deepcopy(model)))
    ours = weights(average.module)
    assert ours.keys() == expected.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_a_quantised_base_is_dequantised_and_its_copy_is_plain(bits: str, tmp_path: Path, caplog) -> None:
    pytest.importorskip("bitsandbytes")
    from kdlm.models import Pretrained

    torch.manual_seed(0)
    sizes = {**SIZES, "hidden_size": 64, "intermediate_size": 64}  # bitsandbytes packs 32 outputs together on a CPU
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(tmp_path / "base")
    model = adapt(Pretrained(path=str(tmp_path / "base"), dtype="float32", quantization=bits).load(), Lora(rank=2))
    average = FrozenCopy(model)
    assert "kept in float32" in caplog.text
    wander(model)
    theirs = model.eval()(input_ids=IDS).logits.float()  # in evaluation, 4 bits are packed anew
    average.move(0.0)
    ours = average.module(input_ids=IDS).logits
    assert (ours - theirs).norm() < 0.05 * theirs.norm()
    average.module.save_pretrained(tmp_path / "average")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "average")
    assert opened.dtype == torch.float32 and getattr(opened.config, "quantization_config", None) is None
    torch.testing.assert_close(opened(input_ids=IDS).logits, ours)


def test_adapters_that_cannot_be_merged_into_one_weight_are_refused() -> None:
    from peft import IA3Config, PromptTuningConfig, get_peft_model

    scaled = get_peft_model(
        student(), IA3Config(task_type="CAUSAL_LM", target_modules=["q_proj"], feedforward_modules=[])
    )
    with pytest.raises(ValueError, match=r"q_proj is adapted by Linear; LoRA and DoRA"):
        FrozenCopy(scaled)
    prompted = get_peft_model(student(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ValueError, match="trains prompts has no weights of its own: train LoRA or DoRA"):
        FrozenCopy(prompted)
