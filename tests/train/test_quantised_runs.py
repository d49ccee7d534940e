"""Runs with quantised parts: adapters on a base of 4 bits, teachers of 8 and 4 bits, students that learn their grid."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from kdlm.check import check
from kdlm.cli import main
from kdlm.losses import kept_rows
from kdlm.recipe import load
from kdlm.sandbox import build
from kdlm.signal import Hidden
from kdlm.train import assemble, train

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
pytest.importorskip("torchao", reason="torchao is not installed")

RECIPE = """
student: {name: sandbox, model: code-student-tiny}
teacher: {name: sandbox, model: code-teacher-tiny}
data: {train: [{path: "sandbox:code/train", limit: 4}], max_length: 32, eval_rows: 1}
method: {name: logit_kd}
losses: [{name: forward_kl}]
training: {max_steps: 4, per_device_train_batch_size: 4, learning_rate: 0.01, logging_steps: 2, save_steps: 2,
           eval_strategy: steps, eval_steps: 2, use_cpu: true}
run_dir: {RUN}
"""
QLORA = ["student.quantization=4bit", "student.lora={rank: 4}"]
ADAPTER = ["student.quantization=4bit", "student.lora={rank: 4, export: adapter}"]
FEW_BITS = ["student.quantization_aware={bits: 3, group_size: 16}"]
IDS = torch.arange(3, 20)[None]


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.replace("{RUN}", str(tmp_path / "run")))
    return path


def run(recipe: Path, *overrides: str) -> Path:
    return train(load(recipe, overrides))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(next((folder / "student").glob("*.safetensors")))


def quantised(**options: str) -> torch.nn.Module:
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    return AutoModelForCausalLM.from_pretrained(build("code-student-tiny"), quantization_config=config, **options)


def test_adapters_alone_train_on_a_base_of_4_bits_and_their_folder_opens_on_it(recipe: Path) -> None:
    from peft import PeftModel

    folder = run(recipe, *ADAPTER)
    assert any(value.abs().max() > 0 for name, value in weights(folder).items() if "lora_B" in name)
    opened = PeftModel.from_pretrained(quantised(), folder / "student").train()
    trained = assemble(load(recipe, ADAPTER)).trainer
    trained._load_from_checkpoint(str(folder / "checkpoint-4"))
    theirs = trained.student.train()(IDS).logits  # a mode in which bitsandbytes has one product on every CPU
    torch.testing.assert_close(opened(IDS).logits, theirs, rtol=1e-5, atol=1e-5)
    scores = json.loads((folder / "results.json").read_text())
    assert scores["eval_kl_to_teacher"] > 0


def test_merged_it_is_the_dequantised_model_that_trained_and_not_quantised_again(recipe: Path) -> None:
    folder = run(recipe, *QLORA)
    assert not list((folder / "student").glob("adapter*"))
    trained = assemble(load(recipe, QLORA)).trainer
    trained._load_from_checkpoint(str(folder / "checkpoint-4"))
    opened = AutoModelForCausalLM.from_pretrained(folder / "student")
    assert opened.dtype == torch.float32 and getattr(opened.config, "quantization_config", None) is None
    torch.testing.assert_close(opened(IDS).logits, trained.student.eval()(IDS).logits, rtol=1e-4, atol=1e-5)
    scores = json.loads((folder / "results.json").read_text())
    again = assemble(load(recipe, [f"student={{name: pretrained, path: {folder / 'student'}}}"])).trainer.evaluate()
    assert again["eval_kl_to_teacher"] == pytest.approx(scores["eval_kl_to_teacher"], rel=1e-5)


@pytest.mark.parametrize("options", [ADAPTER, FEW_BITS], ids=["qlora", "few bits"])
def test_a_run_that_goes_on_from_its_middle_ends_as_if_unbroken(recipe: Path, options: list[str]) -> None:
    folder = run(recipe, *options)
    whole = weights(folder)
    shutil.rmtree(folder / "checkpoint-4")
    shutil.rmtree(folder / "student")
    assert main(["train", str(recipe), "--resume", *options]) == 0
    ours = weights(folder)
    assert ours.keys() == whole.keys() and all(torch.equal(ours[name], whole[name]) for name in whole)


@pytest.mark.parametrize("options", [ADAPTER, FEW_BITS], ids=["qlora", "few bits"])
@pytest.mark.parametrize(
    "change",
    [
        ["training.per_device_train_batch_size=1", "training.gradient_accumulation_steps=4"],
        ["training.gradient_checkpointing=true"],
        ["data.packing=padding_free"],
    ],
    ids=["micro-batches", "checkpointing", "padding-free"],
)
def test_micro_batches_padding_and_checkpointing_change_no_update(
    recipe: Path, tmp_path: Path, options: list[str], change: list[str]
) -> None:
    alike = ["training.optim=sgd", "training.learning_rate=1.0", "training.max_steps=2", *options]
    plain, other = (
        run(recipe, f"run_dir={tmp_path / name}", *alike, *more) for name, more in [("a", []), ("b", change)]
    )
    ours, theirs = weights(plain), weights(other)
    if options is FEW_BITS:  # what trains lies under the grid
        ours, theirs = (load_file(at / "checkpoint-2" / "model.safetensors") for at in (plain, other))
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_a_quantised_teacher_answers_with_hidden_states_and_its_own_whole_head(recipe: Path, bits: str) -> None:
    run = assemble(load(recipe, [f"teacher.quantization={bits}"]))
    teacher, batch = run.trainer.teacher, run.data.collator([run.data.train[0], run.data.train[1]])
    signal = teacher(batch, kept_rows(batch["labels"]))
    assert isinstance(signal, Hidden) and not teacher.moves and teacher.to(torch.device("meta")) is teacher
    whole = AutoModelForCausalLM.from_pretrained(build("code-teacher-tiny"))
    assert torch.equal(signal.head.weight.float(), whole.get_output_embeddings().weight.float())
    logits = teacher.model(batch["input_ids"], attention_mask=batch.get("attention_mask")).logits
    index = kept_rows(batch["labels"]).index
    torch.testing.assert_close(
        signal.head.logits(signal.hidden), logits.flatten(0, 1)[index].float(), rtol=1e-2, atol=1e-2
    )
    gap = (whole(batch["input_ids"], attention_mask=batch.get("attention_mask")).logits - logits).norm()
    assert 0 < gap < 0.3 * logits.norm()


def test_evaluation_does_not_change_a_base_of_4_bits(recipe: Path) -> None:
    trainer = assemble(load(recipe, ADAPTER)).trainer
    before = trainer.student.train()(IDS).logits
    trainer.evaluate()
    assert torch.equal(trainer.student.train()(IDS).logits, before)


def test_a_student_of_few_bits_leaves_its_grid_and_checkpoints_what_lies_under_it(recipe: Path) -> None:
    folder = run(recipe, *FEW_BITS)
    left, under = weights(folder), load_file(folder / "checkpoint-4" / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    groups, below = left[name].view(-1, 16), under[name].view(-1, 16)
    assert max(group.unique().numel() for group in groups) <= 8
    assert max(group.unique().numel() for group in below) > 8
    scores = json.loads((folder / "results.json").read_text())
    again = assemble(load(recipe, [f"student={{name: pretrained, path: {folder / 'student'}}}"])).trainer.evaluate()
    assert again["eval_kl_to_teacher"] == pytest.approx(scores["eval_kl_to_teacher"], rel=1e-6)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([*FEW_BITS, "student.lora={rank: 4}"], "student.quantization_aware: it trains all weights"),
        ([*FEW_BITS, "student.quantization=4bit"], "student.quantization_aware: it trains all weights"),
        (["student.quantization=4bit"], "student.quantization: quantised weights do not train"),
    ],
)
def test_what_cannot_train_is_refused(recipe: Path, options: list[str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check(load(recipe, options))
