"""Methods that learn from themselves on given text: how rows are cut into batches and where a run is cut are inert."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import rows, tiny_model

from kdlm import DistillTrainer
from kdlm.data import Collator
from kdlm.losses import JSD, ForwardKL
from kdlm.methods import CurioSFT, FurtherPretraining, GuidedGenerations, RecursiveKD, TokenPSKD
from kdlm.teachers import SelfTeacher

LENGTHS = [5, 11, 3, 17, 8, 2, 13, 9]
METHODS = {
    "curio_sft": lambda: CurioSFT(decay=0.5, every=2),
    "guided_generations": lambda: GuidedGenerations(label_share=[0.7, 0.4], generation_steps=2),
    "recursive_kd": lambda: RecursiveKD([ForwardKL(), JSD(weight=0.5)], generation_steps=2),
    "recursive_kd_by_epochs": RecursiveKD,
    "recursive_kd_to_start": lambda: RecursiveKD(generation_steps=2),
    "further_pretraining": FurtherPretraining,
    "further_pretraining_of_sequences": lambda: FurtherPretraining(over="sequences", reduction="mean"),
    "token_ps_kd": TokenPSKD,
}


def trainer_of(arguments, name: str, *, layout: str = "padded", **options) -> DistillTrainer:
    teacher: Any = SelfTeacher("start") if name.endswith("to_start") else tiny_model(2)
    return DistillTrainer(
        tiny_model(1),
        teacher if name.startswith(("recursive", "further")) else None,
        arguments(**{"max_steps": 3} | options),
        method=METHODS[name](),
        train_dataset=rows(LENGTHS),
        data_collator=Collator(0, layout=layout),
    )


def trained(arguments, name: str, **options) -> dict[str, torch.Tensor]:
    """Train three SGD steps of all rows in float64 and return the weights of every role."""
    trainer = trainer_of(arguments, name, **options)
    trainer.networks.double()
    for average in trainer.networks.averages.values():
        average.double()
    if hasattr(trainer.teacher, "model"):
        trainer.teacher.model.double()
    trainer.train()
    return weights(trainer)


def weights(trainer: DistillTrainer) -> dict[str, torch.Tensor]:
    roles = ["student", *trainer.networks.averages]
    states = {role: trainer.networks.module_of(role).state_dict() for role in roles}
    return {f"{role}.{key}": value.clone() for role, state in states.items() for key, value in state.items()}


@pytest.mark.parametrize("name", METHODS)
def test_neither_the_cut_into_micro_batches_nor_padding_shows(arguments, name: str) -> None:
    whole = trained(arguments, name, per_device_train_batch_size=8)
    uneven = trained(arguments, name, per_device_train_batch_size=3, gradient_accumulation_steps=3)
    free = trained(arguments, name, layout="padding_free", per_device_train_batch_size=4, gradient_accumulation_steps=2)
    for key, value in whole.items():
        torch.testing.assert_close(uneven[key], value, rtol=1e-6, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}")
        torch.testing.assert_close(free[key], value, rtol=1e-6, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("cut", [3, 4])
@pytest.mark.parametrize("name", METHODS)
def test_a_run_that_is_cut_goes_on_as_if_it_had_not_been(arguments, tmp_path: Path, name: str, cut: int) -> None:
    """Step 4 ends an epoch and a generation, and moves the average; step 3 is within all of them."""
    options = {"per_device_train_batch_size": 2, "max_steps": 9, "optim": "adamw_torch", "learning_rate": 0.01}
    whole = trainer_of(arguments, name, **options)
    whole.train()
    folder = str(tmp_path / "cut")
    trainer_of(arguments, name, **options, output_dir=folder, save_strategy="steps", save_steps=cut).train()
    second = trainer_of(arguments, name, **options, output_dir=folder)
    second.train(resume_from_checkpoint=f"{folder}/checkpoint-{cut}")
    expected = weights(whole)
    assert any(key.startswith(("previous.", "reference.")) for key in expected) != name.startswith("further")
    for key, value in weights(second).items():
        assert torch.equal(value, expected[key]), key
