"""Image classifiers as students and teachers: origins, heads, ensembles, and data with other classes."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForImageClassification

from kdlm.check import check
from kdlm.models import Classifier, ClassifierEnsemble, ImageClassifierSource, view
from kdlm.recipe import load
from kdlm.train import train

MLP = {"model_type": "mlp", "hidden_sizes": [6, 5], "num_labels": 10}
RECIPE = Path(__file__).parents[2] / "recipes" / "vision" / "image_kd.yaml"


def images(count: int = 3) -> torch.Tensor:
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def teacher(tmp_path) -> Path:
    ImageClassifierSource(config={**MLP, "hidden_sizes": [12]}).load().save_pretrained(tmp_path / "teacher")
    return tmp_path / "teacher"


@pytest.mark.parametrize(
    "config",
    [
        MLP,
        {"model_type": "vit", "image_size": 8, "patch_size": 4, "num_channels": 1, "hidden_size": 8, "num_labels": 10,
         "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8},
        {"model_type": "resnet", "num_channels": 1, "embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 1],
         "layer_type": "basic", "num_labels": 10},
        {"model_type": "convnextv2", "num_channels": 1, "patch_size": 2, "num_stages": 2, "hidden_sizes": [4, 8],
         "depths": [1, 1], "num_labels": 10},
    ],
    ids=lambda config: config["model_type"],
)  # fmt: skip
def test_a_configuration_becomes_a_classifier_that_its_folder_opens(config, tmp_path):
    source = ImageClassifierSource(config=config)
    net = source.load().eval()
    assert isinstance(view(net), Classifier) and view(net).num_classes == source.configuration().num_labels == 10
    again = source.load().state_dict()
    assert all(torch.equal(value, again[name]) for name, value in net.state_dict().items())  # the same random weights
    net.save_pretrained(tmp_path)
    opened = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    assert torch.equal(opened(images()).logits, net(images()).logits)


def test_a_fresh_head_keeps_the_body(teacher):
    whole, fresh = (ImageClassifierSource(path=str(teacher), num_labels=n).load() for n in (None, 4))
    assert view(fresh).num_classes == 4 and torch.equal(whole.layers[0][0].weight, fresh.layers[0][0].weight)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "either path"),
        ({"path": "a", "config": MLP}, "either path"),
        ({"config": {"num_labels": 3}}, "config.model_type: missing"),
        ({"config": MLP, "num_labels": 3}, "say it in config"),
    ],
)
def test_an_origin_is_said_once(options, said):
    with pytest.raises(ValueError, match=said):
        ImageClassifierSource(**options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"config": {"model_type": "vitt"}}, "transformers has no 'vitt'"),
        ({"config": {"model_type": "vit", "widht": 3}}, "ViTConfig has no widht"),
        ({"path": "./nowhere"}, "no such model folder"),
        ({"path": "sandbox:digits-mlp"}, "It has: digits-vit, digits-resnet"),
    ],
)
def test_what_cannot_be_opened_is_named(options, said):
    with pytest.raises(ValueError, match=said):
        ImageClassifierSource(**options).load()


def test_an_ensemble_has_the_mean_of_its_members_probabilities():
    members = [ImageClassifierSource(config=MLP, seed=seed).load() for seed in (1, 2, 3)]
    both = view(ClassifierEnsemble(members))
    expected = torch.stack([member(images()).logits.softmax(-1) for member in members]).mean(0)
    torch.testing.assert_close(both(images()).softmax(-1), expected)
    _, features = both.with_features(images(), ["members.1.layers.0"])
    assert torch.equal(features["members.1.layers.0"], members[1].layers[0](images().flatten(1)))
    with pytest.raises(ValueError, match=r"the same classes, they have \[10, 3\]"):
        ClassifierEnsemble([members[0], ImageClassifierSource(config={**MLP, "num_labels": 3}).load()])


def test_an_ensemble_of_one_is_that_one():
    alone = ImageClassifierSource(config=MLP).load()
    torch.testing.assert_close(view(ClassifierEnsemble([alone]))(images()), alone(images()).logits.log_softmax(-1))


def test_a_module_of_ones_own_is_a_classifier_by_its_number_of_classes():
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    assert not isinstance(view(net), Classifier)
    net.num_classes = 3
    assert view(net).num_classes == 3


def short(tmp_path, teacher, *changes):
    steps = ["max_steps=2", "logging_steps=1"]
    named = [f"run_dir={tmp_path / 'run'}", f"teacher.path={teacher}", *changes]
    return load(RECIPE, [*named, *(f"training.{step}" for step in steps)])


def test_a_run_leaves_a_folder_that_transformers_opens_with_names_of_classes(tmp_path, teacher):
    recipe = short(tmp_path, teacher)
    assert any(line.startswith("data: train: sandbox:digits/train, 1438 images of 10") for line in check(recipe))
    run = train(recipe)
    results = json.loads((run / "results.json").read_text())
    assert 0 <= results["eval_accuracy"] <= 1 and {"eval_ece", "eval_brier", "eval_agreement"} <= results.keys()
    student = AutoModelForImageClassification.from_pretrained(run / "student")
    assert student.config.id2label[7] == "7" and student(images()).logits.shape == (3, 10)
    assert "| accuracy, % |" in (run / "student" / "README.md").read_text()


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_classes_that_differ_from_the_datas_are_an_error_before_the_run(tmp_path, teacher, who):
    changes = {"student": "student.config.num_labels=7", "teacher": "teacher.num_labels=7"}[who]
    with pytest.raises(ValueError, match=f"{who}: it tells 7 classes apart, and the data have 10"):
        train(short(tmp_path, teacher, changes))
    assert not (tmp_path / "run").exists()
