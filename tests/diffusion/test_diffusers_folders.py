"""What is opened from a folder of diffusers, what is written for one, and a short run on such a network."""

import json
import sys
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import save_file
from tiny_diffusers import condition, dit, pixart, sd3, sdxl, text_unet, unet
from transformers import TrainingArguments

from kdlm.check import check
from kdlm.data import TensorRows
from kdlm.diffusion import Denoiser, DiffusersDenoiser, Level, UniformTime, guided, load_denoiser
from kdlm.diffusion_trainer import DiffusionTrainer
from kdlm.methods.diffusion.distribution_matching import DistributionMatching
from kdlm.models import DenoiserSource
from kdlm.recipe import Recipe
from kdlm.train import train


def answers(denoiser: Denoiser, *keys: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    noised = torch.randn(2, *denoiser.shape, generator=generator)
    told = {key: value.float() if value.is_floating_point() else value for key, value in condition(2, *keys).items()}
    with torch.no_grad():
        return denoiser(noised, denoiser.form.level(torch.full((2,), 0.6 * denoiser.form.last)), told)


def pipeline(folder: Path, place: str, net, scheduler) -> Path:
    net.save_pretrained(folder / place)
    scheduler.save_pretrained(folder / "scheduler")
    return folder


def test_a_pipeline_folder_is_opened_and_what_is_saved_opens_in_diffusers_and_here(tmp_path: Path) -> None:
    scheduler = diffusers.DDIMScheduler(beta_schedule="scaled_linear", prediction_type="v_prediction")
    opened = load_denoiser(pipeline(tmp_path / "whole", "unet", unet(), scheduler), null_class=10)
    opened.save_pretrained(tmp_path / "saved")
    again = load_denoiser(tmp_path / "saved")
    assert again.prediction == "v_prediction" and again.null_class == 10
    torch.testing.assert_close(answers(again, "labels"), answers(opened, "labels"), rtol=0, atol=0)
    net = diffusers.UNet2DModel.from_pretrained(tmp_path / "saved")
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), opened.net.parameters(), strict=True))
    told = diffusers.DDPMScheduler.from_pretrained(tmp_path / "saved")
    assert told.config.prediction_type == "v_prediction" and told.config.beta_schedule == "scaled_linear"


def test_weights_given_by_name_are_those_that_are_saved_and_read_back(tmp_path: Path) -> None:
    denoiser = DiffusersDenoiser(sd3(), diffusers.FlowMatchEulerDiscreteScheduler())
    zeros = {name: torch.zeros_like(value) for name, value in denoiser.state_dict().items()}
    denoiser.save_pretrained(tmp_path, state_dict=zeros)
    assert any(p.abs().sum() > 0 for p in denoiser.parameters())
    denoiser.load_weights(tmp_path)
    assert all(p.abs().sum() == 0 for p in denoiser.parameters())


def test_no_text_is_what_was_given_for_it_and_goes_along_when_saved(tmp_path: Path) -> None:
    folder = pipeline(tmp_path / "whole", "transformer", sd3(), diffusers.FlowMatchEulerDiscreteScheduler())
    keys = ("encoder_hidden_states", "pooled_projections")
    with pytest.raises(ValueError, match="give `null_condition`"):
        load_denoiser(folder).unconditional(condition(2, *keys))
    save_file({"encoder_hidden_states": torch.ones(5, 12), "pooled_projections": torch.ones(6)}, tmp_path / "empty")
    load_denoiser(folder, null_condition=str(tmp_path / "empty")).save_pretrained(tmp_path / "saved")
    free = load_denoiser(tmp_path / "saved").unconditional(condition(2, *keys))
    assert all(torch.equal(free[key], torch.ones_like(free[key])) for key in keys) and free[keys[0]].shape == (2, 5, 12)
    zeros = load_denoiser(folder, null_condition="zeros").unconditional(condition(2, *keys))
    assert all(zeros[key].abs().sum() == 0 for key in keys)
    with pytest.raises(ValueError, match=r"`encoder_hidden_states` is of shape \[5, 12\]"):
        load_denoiser(tmp_path / "saved").unconditional({keys[0]: torch.ones(2, 7, 12)})


def test_a_pipeline_that_forces_zeros_for_an_empty_prompt_has_them(tmp_path: Path) -> None:
    folder = pipeline(tmp_path, "unet", text_unet(), diffusers.EulerDiscreteScheduler())
    (folder / "model_index.json").write_text(json.dumps({"force_zeros_for_empty_prompt": True}))
    free = load_denoiser(folder).unconditional(condition(2, "encoder_hidden_states"))
    assert free["encoder_hidden_states"].abs().sum() == 0


def test_a_dit_knows_its_null_class_and_drops_no_label_by_itself() -> None:
    denoiser = DiffusersDenoiser(dit(), diffusers.DDIMScheduler()).train()
    told = condition(64, "labels")
    assert denoiser.unconditional(told)["labels"].tolist() == [10] * 64
    noised, level = torch.randn(64, 4, 8, 8), denoiser.form.level(torch.full((64,), 500.0))
    torch.testing.assert_close(denoiser(noised, level, told), denoiser(noised, level, told), rtol=0, atol=0)
    assert not torch.allclose(guided(denoiser, noised, level, told, 1.0), denoiser(noised, level, told))


def test_a_network_in_bfloat16_answers_in_float32(tmp_path: Path) -> None:
    folder = pipeline(tmp_path, "unet", unet(), diffusers.DDIMScheduler())
    half, whole = load_denoiser(folder, dtype=torch.bfloat16), load_denoiser(folder)
    assert half.net.dtype == torch.bfloat16 and answers(half, "labels").dtype == torch.float32
    torch.testing.assert_close(answers(half, "labels"), answers(whole, "labels"), rtol=0.05, atol=0.1)


def test_a_guidance_scale_given_as_an_input_changes_nothing_until_it_is_trained() -> None:
    denoiser = DiffusersDenoiser(text_unet(), diffusers.DDIMScheduler())
    scaled = denoiser.with_guidance()
    assert scaled.takes_guidance and not denoiser.takes_guidance
    keys = "encoder_hidden_states"
    torch.testing.assert_close(answers(scaled, keys), answers(denoiser, keys), rtol=0, atol=0)
    scaled.net.time_embedding.cond_proj.weight.data.fill_(0.1)
    level, noised = denoiser.form.level(torch.full((2,), 500.0)), torch.randn(2, 4, 8, 8)
    one, two = (scaled(noised, level, condition(2, keys), guidance=torch.full((2,), w)) for w in (1.0, 3.0))
    assert not torch.allclose(one, two)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "scheduler" / "scheduler_config.json").unlink(), "no scheduler_config.json"),
        (lambda folder: (folder / "unet" / "config.json").unlink(), "no denoiser here"),
        (lambda folder: rewrite(folder / "unet" / "config.json", "_class_name", "VQModel"), "VQModel is no network"),
        (lambda folder: rewrite(folder / "unet" / "config.json", "sample_size", None), "give `sample_size`"),
        (
            lambda folder: rewrite(folder / "scheduler" / "scheduler_config.json", "_class_name", "SCMScheduler"),
            "SCMScheduler with prediction_type 'trigflow'",
        ),
    ],
)
def test_what_cannot_be_read_is_refused_by_the_folders_name(tmp_path: Path, spoil, message: str) -> None:
    folder = pipeline(tmp_path, "unet", unet(), diffusers.DDIMScheduler())
    spoil(folder)
    with pytest.raises(ValueError, match=f"{folder}: .*{message}"):
        load_denoiser(folder)


def rewrite(file: Path, key: str, value) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value, "prediction_type": "trigflow"}))


def recipe(path: str) -> Recipe:
    source = {"name": "denoiser", "path": path}
    return Recipe.model_validate(
        {
            "student": source, "teacher": source, "data": {"name": "ring"}, "run_dir": "runs/x",
            "method": {"name": "dmd", "steps": [999.0]}, "training": {"max_steps": 2, "use_cpu": True},
        }
    )  # fmt: skip


def test_a_check_names_the_network_and_does_not_look_for_a_hub_id_without_a_network(tmp_path: Path) -> None:
    folder = pipeline(tmp_path, "unet", unet(), diffusers.DDIMScheduler())
    assert f"student: {folder} (UNet2DModel)" in check(recipe(str(folder)))
    said = check(recipe("someone/a-pipeline"))
    assert any(line.startswith("teacher: someone/a-pipeline not looked at here (") for line in said)
    with pytest.raises(ValueError, match=r"student: .*no-such-folder: no such folder"):
        check(recipe("./no-such-folder"))


def test_a_source_hands_its_options_on(tmp_path: Path) -> None:
    folder = pipeline(tmp_path, "unet", unet(sample_size=16), diffusers.DDIMScheduler())
    opened = DenoiserSource(path=str(folder), subfolder="unet", sample_size=8, null_class=3, dtype="bfloat16").load()
    assert opened.shape == (1, 8, 8) and opened.null_class == 3 and opened.net.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="`null_class` is for models of diffusers"):
        DenoiserSource(path="sandbox:ring-exact", null_class=3).load()


@pytest.mark.parametrize("make", [unet, lambda: unet(num_class_embeds=None), text_unet, sdxl, dit, pixart, sd3])
def test_every_network_answers_a_blank_condition_and_shows_its_features(make) -> None:
    net = make()
    denoiser = DiffusersDenoiser(net, diffusers.DDIMScheduler())
    one, noised = torch.ones(1), torch.randn(1, *denoiser.shape)
    inner = "net.mid_block" if hasattr(net, "mid_block") else "net.transformer_blocks.0"
    clean, features = denoiser.with_features(noised, Level(one, one), denoiser.blank(), [inner])
    assert clean.shape == noised.shape and bool(clean.isfinite().all()) and features[inner].shape[0] == 1


def test_sdxl_is_told_the_size_of_its_image_and_the_pooled_text() -> None:
    net = sdxl()
    denoiser = DiffusersDenoiser(net, diffusers.DDIMScheduler(clip_sample=False))
    told = {key: value.float() for key, value in condition(2, "encoder_hidden_states", "pooled_projections").items()}
    noised, level = torch.randn(2, 4, 8, 8), denoiser.form.level(torch.full((2,), 500.0))
    added = {"text_embeds": told["pooled_projections"], "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 2)}
    output = net(noised, torch.tensor(500), told["encoder_hidden_states"], added_cond_kwargs=added).sample
    theirs = level.clean_in(noised, output)
    torch.testing.assert_close(denoiser(noised, level, told), theirs, rtol=1e-3, atol=1e-3)


def test_a_missing_diffusers_is_named_with_the_line_that_installs_it(tmp_path: Path, monkeypatch) -> None:
    folder = pipeline(tmp_path, "unet", unet(), diffusers.DDIMScheduler())
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ValueError, match=r"UNet2DModel needs diffusers: pip install 'kdlm\[diffusion\]'"):
        load_denoiser(folder)


def test_a_recipe_trains_a_network_of_diffusers_on_stored_latents(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    pipeline(tmp_path / "teacher", "transformer", dit(), diffusers.DDIMScheduler(clip_sample=False))
    save_file({"samples": torch.randn(8, 4, 8, 8), "labels": torch.arange(8)}, tmp_path / "latents.safetensors")
    source = {"name": "denoiser", "path": "teacher"}
    recipe = Recipe.model_validate(
        {
            "student": source, "teacher": source, "run_dir": "run",
            "data": {"name": "samples", "train": ["latents.safetensors"], "eval": ["latents.safetensors"]},
            "method": {"name": "dmd", "steps": [999.0], "times": {"name": "uniform"}, "guidance": 1.0, "ema": 0.5},
            "training": {"max_steps": 2, "per_device_train_batch_size": 4, "use_cpu": True, "save_strategy": "no"},
        }
    )  # fmt: skip
    folder = train(recipe) / "student"
    assert load_denoiser(folder).null_class == 10
    student = diffusers.DiTTransformer2DModel.from_pretrained(folder)
    teacher = diffusers.DiTTransformer2DModel.from_pretrained(tmp_path / "teacher" / "transformer")
    assert any(not torch.equal(p, q) for p, q in zip(student.parameters(), teacher.parameters(), strict=True))


def run(folder: Path, method: DistributionMatching, **options) -> DiffusionTrainer:
    scheduler = diffusers.DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False)
    student, teacher = (DiffusersDenoiser(unet(), scheduler, null_class=10) for _ in range(2))
    generator = torch.Generator().manual_seed(0)
    columns = {
        "samples": torch.randn(8, 1, 8, 8, generator=generator),
        "labels": torch.arange(8),
        "index": torch.arange(8),
    }
    args = TrainingArguments(
        output_dir=str(folder), report_to="none", use_cpu=True, per_device_train_batch_size=4, learning_rate=1e-3,
        logging_steps=1, disable_tqdm=True, seed=3, lr_scheduler_type="constant", **{"save_strategy": "no", **options},
    )  # fmt: skip
    return DiffusionTrainer(student, teacher, args, method=method, train_dataset=TensorRows(columns))


def dmd() -> DistributionMatching:
    return DistributionMatching(steps=[999.0, 500.0], times=UniformTime(), guidance=1.0, ratio=2, ema=0.9)


def weights(trainer: DiffusionTrainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.networks.named_parameters()}


def test_distribution_matching_on_a_unet_resumes_bit_for_bit_and_exports_it(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", dmd(), max_steps=4, save_strategy="steps", save_steps=2)
    start = weights(whole)
    whole.train()
    assert all(any(not torch.equal(start[k], v) for k, v in weights(whole).items() if role in k)
               for role in ("student", "fake"))  # fmt: skip
    resumed = run(tmp_path / "resumed", dmd(), max_steps=4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert all(torch.equal(value, weights(whole)[name]) for name, value in weights(resumed).items())
    average = zip(whole.exported.parameters(), resumed.exported.parameters(), strict=True)
    assert all(torch.equal(p, q) for p, q in average)
    assert resumed.sample(3, {"labels": torch.arange(3)}).shape == (3, 1, 8, 8)
    whole.exported.save_pretrained(tmp_path / "student")
    net = diffusers.UNet2DModel.from_pretrained(tmp_path / "student")
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), whole.exported.net.parameters(), strict=True))


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
def test_gradient_checkpointing_changes_no_weight(tmp_path: Path) -> None:
    plain, checkpointed = (run(tmp_path, dmd(), max_steps=2, gradient_checkpointing=on) for on in (False, True))
    plain.train()
    checkpointed.train()
    assert checkpointed.student.net.is_gradient_checkpointing
    for name, value in weights(plain).items():
        torch.testing.assert_close(weights(checkpointed)[name], value, rtol=1e-5, atol=1e-6)
