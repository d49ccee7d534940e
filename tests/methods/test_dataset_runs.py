"""Whole runs whose student is a set of images: what it begins as, how it is judged, resumed, chosen and handed out."""

import json
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from kdlm import checkpoints
from kdlm.data import TensorRows
from kdlm.methods import Step
from kdlm.methods.dataset.augmentation import Augmentation
from kdlm.methods.dataset.evaluation import Evaluation, accuracies, class_means, random_sets
from kdlm.methods.dataset.networks import MLP, ConvNet
from kdlm.methods.dataset.trajectory_matching import FTDSection, MTTSection
from kdlm.models import SyntheticStudent, load_synthetic
from kdlm.recipe import Recipe, load
from kdlm.train import train

RECIPES = Path(__file__).parents[2] / "recipes" / "dataset"
QUICK = {"method.evaluation": "{networks: 1, steps: 5}", "training.logging_steps": 1, "training.use_cpu": "true"}
TINY = {
    "dm": {"method.network.width": 8, "training.per_device_train_batch_size": 64},
    "mtt": {"method.network.width": 8, "method.experts": "{count: 2}", "method.max_start": 2, "method.inner_steps": 2},
}
TINY["ftd"] = TINY["mtt"] | {"method.experts": "{count: 2, rho: 0.01, alpha: 0.4}", "method.ema": 0.5}


def recipe(name: str, folder: Path, **changes) -> Recipe:
    every = QUICK | TINY[name] | {"run_dir": folder} | {key.replace("__", "."): value for key, value in changes.items()}
    return load(RECIPES / f"{name}.yaml", [f"{key}={value}" for key, value in every.items()])


def rows(count: int = 30) -> TensorRows:
    labels = torch.arange(count) % 3
    labels[-1] = -100
    return TensorRows({"pixel_values": torch.randn(count, 1, 4, 4), "labels": labels, "index": torch.arange(count)})


@pytest.mark.parametrize("name", ["dm", "ftd"])
def test_a_run_stopped_in_the_middle_goes_on_to_the_same_bits(name, tmp_path, capsys) -> None:
    every = {"training__save_steps": 2, "training__eval_steps": 2, "training__save_total_limit": 5}
    whole = train(recipe(name, tmp_path / "whole", **every, training__max_steps=4))
    train(recipe(name, tmp_path / "broken", **every, training__max_steps=2))
    again = train(recipe(name, tmp_path / "broken", **every, training__max_steps=4), resume=True)
    assert "resuming at step 2" in capsys.readouterr().out
    roles = ["model.safetensors", *(["kdlm/average.safetensors"] if name == "ftd" else [])]
    for file in roles:
        expected, got = (load_file(run / "checkpoint-4" / file) for run in (whole, again))
        assert expected.keys() == got.keys() and all(torch.equal(expected[key], got[key]) for key in expected)
    losses = [
        [line["loss"] for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "loss" in line]
        for run in (whole, again)
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 4


def test_the_best_set_by_evaluation_is_handed_out_and_not_the_last(tmp_path) -> None:
    settings = {"training__save_steps": 1, "training__eval_steps": 1, "training__max_steps": 4}
    settings |= {"training__greater_is_better": "false"}  # so short a run has its clearest figure in the middle
    run = train(recipe("ftd", tmp_path / "run", **settings, training__save_total_limit=9, training__learning_rate=0.5))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = {line["step"]: line["eval_accuracy"] for line in lines if "eval_accuracy" in line}
    best = min(found, key=found.__getitem__)
    assert best < 4
    handed_out = load_file(run / "student" / "model.safetensors")
    assert torch.equal(
        handed_out["pixel_values"], load_file(run / f"checkpoint-{best}/kdlm/average.safetensors")["pixel_values"]
    )
    assert json.loads((run / "results.json").read_text())["eval_accuracy"] == found[best]


def test_an_exported_set_is_opened_again_and_there_to_be_seen(tmp_path) -> None:
    settings = {"training__save_strategy": "'no'", "training__load_best_model_at_end": "false"}
    run = train(recipe("mtt", tmp_path / "run", **settings, training__max_steps=1, student__soft_labels="true"))
    kept = load_synthetic(run / "student")
    assert kept.pixel_values.shape == (10, 1, 8, 8) and kept.labels.tolist() == list(range(10))
    assert not torch.equal(kept.targets, torch.eye(10)) and torch.allclose(kept.targets.sum(-1), torch.ones(10))
    assert 0.04 < kept.learning_rate < 0.06 and kept.learning_rate != 0.05
    again = tmp_path / "again"
    again.mkdir()
    checkpoints.save_module(kept, again)
    assert (again / "model.safetensors").read_bytes() == (run / "student" / "model.safetensors").read_bytes()
    assert (run / "student" / "sheet.png").read_bytes()[:4] == b"\x89PNG"
    files = sorted((run / "student" / "images").rglob("*.png"))
    assert [file.parent.name for file in files] == [str(label) for label in range(10)]
    drawn = torch.tensor(numpy.stack([numpy.asarray(Image.open(file)) for file in files]))[:, None] / 127.5 - 1
    assert torch.allclose(drawn, kept.pixel_values.clamp(-1, 1), atol=0.5 / 127.5 + 1e-6)
    with pytest.raises(ValueError, match="no set of synthetic images"):
        load_synthetic(tmp_path)


def test_a_set_begins_as_real_images_as_means_or_as_noise() -> None:
    given = rows()
    shown, labels = given.columns["pixel_values"], given.columns["labels"]
    real = SyntheticStudent(images_per_class=2).load_from(given, seed=0)
    assert real.labels.tolist() == [0, 0, 1, 1, 2, 2]
    for image, label in zip(real.pixel_values, real.labels, strict=True):
        same = (shown == image).flatten(1).all(-1)
        assert labels[same].tolist() == [label]
    other = SyntheticStudent(images_per_class=2).load_from(given, seed=1)
    assert not torch.equal(real.pixel_values, other.pixel_values)
    means = SyntheticStudent(start="class_means", soft_labels=True).load_from(given, seed=0)
    assert torch.allclose(means.pixel_values, class_means(shown[:-1], labels[:-1])[0], atol=1e-6)
    assert torch.allclose(means.targets.diag(), torch.full((3,), 0.9))
    noise = SyntheticStudent(start="noise", images_per_class=3).load_from(given, seed=0)
    assert noise.pixel_values.shape == (9, 1, 4, 4) and noise.pixel_values.mean().abs() < 0.3
    with pytest.raises(ValueError, match=r"student\.images_per_class: 10 asked for, .* 9 of class 2"):
        SyntheticStudent(images_per_class=10).load_from(given, seed=0)


def test_judging_a_set_is_the_same_twice_and_touches_no_random_number_of_the_run() -> None:
    given = rows().columns
    shown, labels = given["pixel_values"][:-1], given["labels"][:-1]
    evaluation, sets = Evaluation(networks=2, steps=3, batch_size=8), random_sets(shown, labels, 2, draws=3)
    assert len({images.sum().item() for images, _ in sets}) == 3
    assert all(classes.bincount().tolist() == [2, 2, 2] for _, classes in sets)
    state = torch.get_rng_state()
    first, second = (
        accuracies([*sets, (shown, labels)], (shown, labels), ConvNet(width=4), evaluation, Augmentation(turn=9))
        for _ in range(2)
    )
    assert torch.equal(first, second) and first.shape == (4, 2)
    assert torch.equal(state, torch.get_rng_state())


def test_evaluation_trains_once_a_set_and_tells_of_its_beginning_and_of_a_second_architecture(monkeypatch) -> None:
    given, trainings = rows(), []
    student = SyntheticStudent(learning_rate=0.1).load_from(given, seed=0)
    evaluation = Evaluation(networks=2, steps=3, second=ConvNet(width=4, depth=1))
    method = MTTSection(network=MLP(width=4), evaluation=evaluation).build([], None)
    trained = Evaluation.trained
    monkeypatch.setattr(Evaluation, "trained", lambda *args: (trainings.append(args[1]), trained(*args))[1])
    batch = {key: value[:12] for key, value in given.columns.items()}
    terms = [method.evaluate({"student": student}, batch, Step(0, 1)) for _ in range(2)]
    assert [type(each) for each in trainings] == [MLP, MLP, ConvNet]
    assert terms[0].metrics["accuracy"][0] == terms[1].metrics["start_accuracy"][0]
    assert terms[0].metrics.keys() == {"accuracy", "start_accuracy", "second_accuracy"}
    with torch.no_grad():
        student.pixel_values.add_(1)
    method.evaluate({"student": student}, batch, Step(1, 1))
    assert len(trainings) == 5  # the beginning has not changed


def test_ftd_is_mtt_with_flat_experts_and_an_average() -> None:
    flat, plain = FTDSection().build([], None), MTTSection().build([], None)
    assert (flat.experts.rho, flat.experts.alpha, flat.ema, flat.exported) == (0.01, 0.4, 0.9995, "average")
    assert (plain.experts.rho, plain.ema, plain.exported) == (0, None, "student")
    assert type(flat) is type(plain)
    with pytest.raises(ValueError, match="has a loss of its own"):
        FTDSection().build([object()], None)
