"""Small classifiers of 8 x 8 images of four classes, in float64, and what runs a method on them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments, ViTConfig, ViTForImageClassification

from kdlm import DistillTrainer
from kdlm.data import TensorRows
from kdlm.methods import Method, Step
from kdlm.models import view
from kdlm.networks import Networks

CLASSES = 4
STEP = Step(index=0, total=10, seed=3)


class SmallCNN(nn.Module):
    """Two stages, 8 x 8 and 4 x 4, and an embedding."""

    num_classes, image_shape = CLASSES, (1, 8, 8)

    def __init__(self, width: int = 4, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.fine = nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.GELU())
        self.coarse = nn.Sequential(nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), nn.GELU())
        self.embedding = nn.Linear(2 * width, width)
        self.classes = nn.Linear(width, CLASSES)
        self.double()

    def forward(self, images):
        return self.classes(self.embedding(self.coarse(self.fine(images)).mean((2, 3))).relu())


def small_vit(width: int = 8, patch: int = 2) -> ViTForImageClassification:
    torch.manual_seed(1)
    config = ViTConfig(
        hidden_size=width, num_hidden_layers=2, num_attention_heads=2, intermediate_size=2 * width, image_size=8,
        patch_size=patch, num_channels=1, num_labels=CLASSES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return ViTForImageClassification(config).double().eval()


def image_rows(count: int = 8, seed: int = 0) -> TensorRows:
    """Random images; every fourth is without a label."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 1, 8, 8, generator=generator, dtype=torch.float64)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    labels[::4] = -100
    return TensorRows({"pixel_values": images, "labels": labels, "index": torch.arange(count)})


def nets_of(method: Method, student: nn.Module, teacher: nn.Module) -> dict[str, Any]:
    """Return the views of a run, its roles built, all in float64."""
    networks = Networks(student, method, view(teacher.requires_grad_(False))).double()
    return networks.views


def gradients(method: Method, nets: dict[str, Any], rows: TensorRows) -> dict[str, torch.Tensor]:
    """Return the gradient of the weighted sum of a step's terms, by role and parameter, and `loss`."""
    terms = method.losses(nets, rows.columns, frozenset({"student"}), STEP).terms
    loss = sum(term.weight * term.sum for term in terms.values())
    found = {}
    for role, net in nets.items():
        module = getattr(net, "module", net)
        for name, parameter in module.named_parameters() if role != "teacher" else ():
            parameter.grad = None
            found[f"{role}.{name}"] = parameter
    loss.backward()
    return {name: p.grad for name, p in found.items() if p.grad is not None} | {"loss": loss.detach()}


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    """Return those of four plain steps on a CPU, but for `options`."""
    return TrainingArguments(
        output_dir=str(folder), report_to="none", use_cpu=True, per_device_train_batch_size=8,
        **{"max_steps": 4, "learning_rate": 0.01, "save_strategy": "no", "disable_tqdm": True, "seed": 3} | options,
    )  # fmt: skip


def trainer_of(method: Method, folder: Path, student: Callable = SmallCNN, **options: Any) -> DistillTrainer:
    """Return a trainer of small nets; `options` are training arguments."""
    args = arguments(folder, **options)
    torch.manual_seed(7)
    teacher = SmallCNN(6, seed=1).float()
    rows = {split: image_rows(count) for split, count in (("train", 16), ("eval", 6))}
    floats = {s: TensorRows({**r.columns, "pixel_values": r.columns["pixel_values"].float()}) for s, r in rows.items()}
    return DistillTrainer(
        student().float(), teacher, args, method=method, train_dataset=floats["train"], eval_dataset=floats["eval"]
    )


def resumed_equals_whole(make: Callable[[], Method], folder: Path, student: Callable = SmallCNN) -> None:
    """Assert of small nets what `resumed` does."""
    resumed(lambda place, **options: trainer_of(make(), place, student, **options), folder)


def resumed(trainer: Callable[..., DistillTrainer], folder: Path) -> tuple[DistillTrainer, DistillTrainer]:
    """Assert that four steps, and two with two more after a resume, end in the same weights of every role.

    `trainer` makes one of a folder and training arguments; returned are the one of four steps and the one that resumed.
    """
    whole = trainer(folder / "whole")
    whole.train()
    trainer(folder / "cut", save_strategy="steps", save_steps=2).train()
    second = trainer(folder / "cut")
    second.train(resume_from_checkpoint=str(folder / "cut" / "checkpoint-2"))
    expected = whole.networks.state_dict()
    for name, tensor in second.networks.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    for name, tensor in second.method.state_dict().items():
        assert torch.equal(tensor, whole.method.state_dict()[name]), name
    return whole, second
