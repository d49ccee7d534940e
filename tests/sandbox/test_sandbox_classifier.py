import json
import sys

import torch

from kdlm.sandbox import build
from kdlm.sandbox.catalog import CATALOG
from kdlm.sandbox.digits import digits
from kdlm.sandbox.digits_classifier import digits_classifier
from kdlm.sandbox.progress import silent


def test_the_classifier_reads_digits_it_has_not_seen():
    net = digits_classifier(progress=None)
    _, test = digits()
    features, logits = net(test.images * 2 - 1)
    assert features.shape == (len(test.labels), 32) and logits.shape == (len(test.labels), 10)
    accuracy = (logits.argmax(-1) == test.labels).double().mean().item()
    assert accuracy >= 0.97
    figures = json.loads((build("digits-classifier") / "sandbox.json").read_text())["figures"]
    assert figures["test_accuracy"] == round(accuracy, 4)


def test_it_comes_frozen_and_in_evaluation_mode():
    net = digits_classifier(progress=None)
    assert not net.training and not any(parameter.requires_grad for parameter in net.parameters())
    samples = torch.randn(3, 1, 8, 8, requires_grad=True)
    net(samples)[0].sum().backward()
    assert samples.grad is not None and samples.grad.abs().sum() > 0, "a loss may still flow through it"


def test_its_features_have_mean_0_and_spread_1_over_the_training_images():
    train, _ = digits()
    features, _ = digits_classifier(progress=None)(train.images * 2 - 1)
    torch.testing.assert_close(features.mean(0), torch.zeros(32), atol=1e-4, rtol=0)
    torch.testing.assert_close(features.std(0), torch.ones(32), atol=1e-4, rtol=0)


def test_another_build_makes_the_same_weights_and_leaves_the_random_state_alone(tmp_path):
    before = torch.get_rng_state()
    CATALOG["digits-classifier"].spec.make(tmp_path, {}, silent, "digits-classifier")
    assert torch.equal(torch.get_rng_state(), before)
    first, second = (folder / "model.safetensors" for folder in (build("digits-classifier", progress=None), tmp_path))
    assert first.read_bytes() == second.read_bytes()


def test_once_built_it_opens_without_scikit_learn(monkeypatch):
    build("digits-classifier", progress=None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    digits_classifier(progress=None)
