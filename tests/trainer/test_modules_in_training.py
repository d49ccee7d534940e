"""Students with other modules inside: cut and resume of their runs do not show in the weights."""

from pathlib import Path

import pytest
import torch
from tiny_models import rows, tiny_model

from kdlm import DistillTrainer
from kdlm.data import Collator
from kdlm.losses import ForwardKL
from kdlm.methods import ACM, LayerMatching
from kdlm.models.adaptive_student import described, make_adaptive
from kdlm.models.hybrids import hybrid

METHODS = {
    "learners": lambda: ACM(stage="learners"),
    "gates": lambda: ACM(stage="gates"),
    "whole": lambda: ACM([ForwardKL()], budget_weight=1.0, diversity_weight=0.5),
    "layer_matching": lambda: LayerMatching([ForwardKL()]),
}
LENGTHS = [5, 11, 3, 17, 8, 2, 13, 9]


def student(method: str):
    if method == "layer_matching":
        return hybrid(tiny_model(1), [1])
    model = tiny_model(1)
    described(model.config, None, 4)
    torch.manual_seed(2)
    return make_adaptive(model)


def trainer(arguments, method: str, **options) -> DistillTrainer:
    torch.manual_seed(5)
    return DistillTrainer(
        student(method).double(),
        tiny_model(2).double(),
        arguments(**options),
        method=METHODS[method](),
        train_dataset=rows(LENGTHS),
        data_collator=Collator(0),
    )


def weights(run: DistillTrainer) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in run.student.named_parameters()}


@pytest.mark.parametrize("method", METHODS)
def test_one_batch_of_eight_equals_uneven_micro_batches(arguments, method: str) -> None:
    """Two steps, so that what the second knows of the first is there too."""
    ended, moved = [], []
    for options in ({}, {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 3}):
        run = trainer(arguments, method, max_steps=2, learning_rate=0.02, **options)
        began = weights(run)
        run.train()
        ended.append(weights(run))
        moved.append(max((ended[-1][name] - began[name]).abs().max() for name in began))
    assert min(moved) > 1e-4
    for name, weight in ended[0].items():
        torch.testing.assert_close(ended[1][name], weight, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("method", ["whole", "layer_matching"])
def test_a_resumed_run_ends_as_an_unbroken_one(arguments, method: str, tmp_path: Path) -> None:
    options = {"max_steps": 4, "optim": "adamw_torch", "learning_rate": 1e-3}
    whole = trainer(arguments, method, save_strategy="steps", save_steps=2, **options)
    whole.train()
    again = trainer(arguments, method, output_dir=str(tmp_path / "again"), **options)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert all(torch.equal(value, weights(again)[name]) for name, value in weights(whole).items())
    assert all(torch.equal(value, again.method.state_dict()[name]) for name, value in whole.method.state_dict().items())
