"""The student of two heads: what it answers, what each head learns from, and its folder."""

from pathlib import Path

import pytest
import torch
from torch.nn.functional import normalize
from transformers import AutoModelForImageClassification

from kdlm.models import DualHead, DualHeadStudent, ImageClassifierSource, view

CONFIG = {"model_type": "mlp", "hidden_sizes": [6, 5], "num_labels": 10}


def images() -> torch.Tensor:
    return torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def student(**options) -> DualHead:
    return DualHeadStudent(of=ImageClassifierSource(config=CONFIG), feature="layers.1", **options).load()


@pytest.mark.parametrize("mix", [0.0, 0.3, 1.0])
def test_its_answer_is_the_mean_of_both_heads(mix):
    net = student(mix=mix, temperature=0.5, scale=7.0)
    own, second = net.heads(images())
    assert torch.equal(own, net.module(images()).logits)
    expected = mix * own.softmax(-1) + (1 - mix) * (second / 0.5).softmax(-1)
    torch.testing.assert_close(view(net)(images()).softmax(-1), expected)
    hidden = net.module.layers[1](net.module.layers[0](images().flatten(1)))
    assert (second.abs() <= 7 * net.second.norm(dim=-1) + 1e-5).all()
    torch.testing.assert_close(second, 7 * normalize(hidden, dim=-1) @ net.second.T)


def test_labels_teach_its_own_head_and_the_teacher_the_second():
    net = student()
    values = [head.square().sum() for head in net.heads(images())]
    gradients = [
        torch.autograd.grad(value, [*net.parameters()], allow_unused=True, retain_graph=True) for value in values
    ]
    names = [name for name, _ in net.named_parameters()]
    reached = [{name for name, g in zip(names, found, strict=True) if g is not None} for found in gradients]
    assert "second" not in reached[0] and "second" in reached[1]
    assert "module.classifier.weight" in reached[0] and "module.classifier.weight" not in reached[1]
    assert "module.layers.0.0.weight" in reached[0] & reached[1]


def test_its_folder_opens_whole_or_with_its_own_head_alone(tmp_path: Path):
    net = student(mix=0.3)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter))
    net.save_pretrained(tmp_path)
    plain = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(plain(images()).logits, net.heads(images())[0])
    section = DualHeadStudent(of=ImageClassifierSource(path=str(tmp_path)), feature="layers.1", mix=0.3)
    assert torch.equal(section.load()(images()), net(images()))
    other = student(mix=0.3)
    other.load_weights(tmp_path)
    assert torch.equal(other(images()), net(images()))
