"""Vision-language models through `kdlm train`: the stages of LLaVA-KD, other methods, resume, export, LoRA."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_vlm import rendered, tiny_vlm
from transformers import AutoModelForImageTextToText, AutoProcessor, TrainingArguments

from kdlm import DistillTrainer, cli
from kdlm.check import check
from kdlm.data import ImageTextCollator
from kdlm.losses import CrossEntropy, ForwardKL
from kdlm.methods import HiddenKD, LlavaKD, LogitKD, Taid
from kdlm.recipe import load
from kdlm.sandbox import build
from kdlm.sandbox.vision_language import processor

FOLDER = Path(__file__).parents[2] / "recipes" / "vision_language"
STUDENT = "sandbox:digits-vlm-student"
READS = processor(4)
METHODS = {
    "llava_kd": lambda: LlavaKD([ForwardKL(), CrossEntropy(weight=0.5)]),
    "logit_kd": lambda: LogitKD([ForwardKL()]),
    "taid": Taid,
    "hidden_kd": lambda: HiddenKD([ForwardKL()], layers=[(0, 1)]),
}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(name: str, *changes: str) -> int:
    short = ["max_steps=4", "per_device_train_batch_size=2", "save_steps=2", "eval_steps=4", "warmup_steps=0"]
    overrides = ["data.train.0.limit=8", "data.eval.0.limit=3", "training.use_cpu=true"]
    if name != "sft.yaml":  # the sandbox's teacher takes a minute to build
        overrides.append(f"teacher.path={STUDENT}")
    return cli.main(["train", str(FOLDER / name), *overrides, *(f"training.{change}" for change in short), *changes])


def weights(folder: str) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "model.safetensors")


def test_the_three_stages_follow_one_another_and_each_trains_its_parts() -> None:
    assert run("pretrain.yaml") == 0
    assert run("sft.yaml") == 0
    assert run("finetune.yaml") == 0
    start, first = weights(str(build("digits-vlm-student"))), weights("runs/vision_language/pretrain/student")
    moved = {name for name in start if not torch.equal(start[name], first[name])}
    assert moved == {name for name in start if "multi_modal_projector" in name}
    second, third = (weights(f"runs/vision_language/{name}/student") for name in ("sft", "finetune"))
    for before, after in ((first, second), (second, third)):
        assert {"vision_tower", "multi_modal_projector", "language_model"} <= {
            part for name in before if not torch.equal(before[name], after[name]) for part in name.split(".")
        }
    results = json.loads(Path("runs/vision_language/finetune/results.json").read_text())
    assert {"eval_visual", "eval_relation", "eval_kl_to_teacher", "eval_top1_agreement"} <= set(results)


def test_the_student_opens_as_what_it_is_and_answers() -> None:
    assert run("pretrain.yaml") == 0
    folder = "runs/vision_language/pretrain/student"
    model, reads = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    row = rendered(1)[0]
    batch = ImageTextCollator(reads, 64)([row])
    asked = {name: batch[name][:, :-3] for name in ("input_ids", "attention_mask")}
    answer = model.generate(**asked, pixel_values=batch["pixel_values"], max_new_tokens=2, do_sample=False)
    assert answer.shape[1] <= asked["input_ids"].shape[1] + 2
    assert reads.chat_template == READS.chat_template


def test_a_run_resumed_in_its_middle_ends_with_the_same_weights() -> None:
    assert run("pretrain.yaml", "run_dir=whole", "student.trainable=null") == 0
    shutil.copytree("whole", "parts")
    for name in ("checkpoint-4", "student"):
        shutil.rmtree(Path("parts", name))
    recipe = Path("parts", "recipe.yaml")
    recipe.write_text(recipe.read_text().replace("run_dir: whole", "run_dir: parts"))
    assert run("pretrain.yaml", "run_dir=parts", "student.trainable=null", "--resume") == 0
    whole, parts = weights("whole/student"), weights("parts/student")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_adapters_train_and_are_merged_into_a_model_that_opens() -> None:
    lora = "student.lora={rank: 2, target_modules: [q_proj, v_proj]}"
    assert run("pretrain.yaml", "student.trainable=null", lora) == 0
    model = AutoModelForImageTextToText.from_pretrained("runs/vision_language/pretrain/student")
    assert type(model).__name__ == "LlavaForConditionalGeneration"


def test_a_part_that_is_not_there_is_named_with_the_nearest(capsys) -> None:
    assert run("pretrain.yaml", "student.trainable=[model.projector]") == 2
    said = capsys.readouterr().err
    assert "student.trainable: LlavaForConditionalGeneration has no module 'model.projector'" in said
    assert "model.multi_modal_projector" in said
    assert not Path("runs").exists()


def test_what_does_not_fit_together_is_said_by_the_check() -> None:
    def problem(*changes: str) -> str:
        with pytest.raises(ValueError) as error:
            check(load(FOLDER / "pretrain.yaml", [f"teacher.path={STUDENT}", *changes]))
        return str(error.value)

    assert "student: sandbox reads no images" in problem("student={name: sandbox, model: code-student-tiny}")
    assert "rollouts:" in problem("method={name: gkd}", "rollouts={}")
    assert "data: text does not provide visual" in problem('data={train: [{path: "sandbox:code/train"}]}')
    assert "keep one" in problem("student.lora={}")


def trained(method: str, tmp_path: Path, *, wide: int = 0, **options) -> dict[str, torch.Tensor]:
    """Train one SGD step in float64 and return the student's weights; `wide` pads every batch."""
    student, teacher = tiny_vlm(1).double(), tiny_vlm(2, width=24, layers=2).double()
    torch.manual_seed(5)  # projectors
    plain = {"per_device_train_batch_size": 8, "max_steps": 1, "learning_rate": 0.1, "optim": "sgd", "use_cpu": True}
    args = TrainingArguments(
        output_dir=str(tmp_path), report_to="none", save_strategy="no", max_grad_norm=0.0, disable_tqdm=True,
        lr_scheduler_type="constant", **(plain | options),
    )  # fmt: skip
    collate = ImageTextCollator(READS, 200)

    def padded(rows):
        batch = collate(rows)
        for name, fill in (("input_ids", 1), ("labels", -100), ("visual", -1), ("attention_mask", 0)):
            batch[name] = torch.nn.functional.pad(batch[name], (0, wide), value=fill)
        return {name: value.double() if value.is_floating_point() else value for name, value in batch.items()}

    rows = rendered(8)
    trainer = DistillTrainer(student, teacher, args, method=METHODS[method](), train_dataset=rows, data_collator=padded)
    trainer.networks.double()
    trainer.train()
    return {name: parameter.detach().clone() for name, parameter in trainer.student.named_parameters()}


@pytest.mark.parametrize("method", METHODS)
def test_the_gradient_does_not_change_with_micro_batches_or_padding(method: str, tmp_path: Path) -> None:
    whole = trained(method, tmp_path)
    uneven = trained(method, tmp_path, per_device_train_batch_size=3, gradient_accumulation_steps=3)
    wide = trained(method, tmp_path, wide=5)
    start = dict(tiny_vlm(1).double().named_parameters())
    assert max((whole[name] - start[name]).abs().max().item() for name in start) > 1e-4, "the step moves nothing"
    for other in (uneven, wide):
        for name, weight in whole.items():
            torch.testing.assert_close(other[name], weight, rtol=1e-6, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
