"""Consistency methods under the trainer: on a ring of Gaussians one step comes to the modes."""

import pytest
import torch
from datasets import Dataset
from transformers import TrainingArguments

from kdlm.diffusion import LogNormal, MixtureDenoiser, ResidualDenoiser
from kdlm.diffusion_trainer import DiffusionTrainer
from kdlm.methods import Consistency, ContinuousConsistency, LatentConsistency, ScoreRegularisedConsistency
from kdlm.methods.diffusion.level_pairs import KarrasGrid, ShrinkingGap
from kdlm.sandbox.ring import SHARES, STD, centres, ring

GRID = KarrasGrid(steps=12, low=0.02, high=4.0)
TIMES = LogNormal(mean=0.0, std=1.2)
METHODS = {
    "distillation": lambda: Consistency(steps=[4.0], pairs=GRID, ema=0.98),
    "training": lambda: Consistency(
        steps=[4.0], pairs=ShrinkingGap(times=TIMES, stages=4), solver="none", target=0.9, ema=0.98
    ),
    "continuous": lambda: ContinuousConsistency(steps=[4.0], times=TIMES, sigma_data=1.4, warmup=50, ema=0.98),
    "regularised": lambda: ScoreRegularisedConsistency(
        steps=[4.0], times=TIMES, sigma_data=1.4, warmup=50, ratio=2, matching_times=TIMES, fake="student", ema=0.98
    ),
}


def exact() -> MixtureDenoiser:
    return MixtureDenoiser(centres(), STD, torch.tensor(SHARES))


def trainer(method, folder, steps: int, *, teacher=None, student=None, rows=None, **arguments) -> DiffusionTrainer:
    torch.manual_seed(0)
    points = ring(4096)
    data = rows or Dataset.from_dict({"samples": points.tolist(), "index": range(len(points))}).with_format("torch")
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=128,
        learning_rate=2e-3,
        lr_scheduler_type="cosine",
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **arguments,
    )
    return DiffusionTrainer(
        student or ResidualDenoiser((2,), width=48, depth=2, sigma_data=1.4),
        teacher,
        args,
        method=method,
        train_dataset=data,
    )


def miss(points: torch.Tensor) -> float:
    """Median distance to the nearest centre; 0.18 of the data themselves."""
    return torch.cdist(points, centres()).min(1).values.median().item()


@pytest.mark.parametrize("name", METHODS)
def test_one_step_comes_to_the_modes(name, tmp_path):
    method = METHODS[name]()
    run = trainer(method, tmp_path, 150, teacher=None if name == "training" else exact())
    before = miss(run.sample(512, of="student"))
    run.train()
    assert miss(run.sample(512)) < 0.5 * before


def test_a_latent_student_learns_under_labels_and_guidance(tmp_path):
    rows = Dataset.from_dict({"samples": ring(256).tolist(), "index": range(256), "labels": [0, 1] * 128})
    nets = [ResidualDenoiser((2,), width=16, depth=1, num_classes=2, guided=guided) for guided in (True, False)]
    method = LatentConsistency(steps=[4.0], pairs=GRID, guidance=(0.0, 2.0), sampled_guidance=1.0, target=0.95)
    run = trainer(method, tmp_path, 3, student=nets[0], teacher=nets[1], rows=rows.with_format("torch"))
    run.train()
    assert nets[0].get_parameter("guidance.weight").any()
    assert run.sample(4, {"labels": torch.tensor([0, 1, 0, 1])}).shape == (4, 2)
