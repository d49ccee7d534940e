"""DHO through the trainer: its terms, its student, a resume."""

import pytest
import torch
from small_images import SmallCNN, gradients, image_rows, nets_of, trainer_of
from test_image_kd import PIECES, step_gradient
from torch import nn
from torch.testing import assert_close

from kdlm.losses import CrossEntropy, ForwardKL
from kdlm.methods import DHO
from kdlm.models import DualHead, ImageClassifierSource

CONFIG = {"model_type": "mlp", "hidden_sizes": [6, 5], "num_labels": 4}


def student() -> nn.Module:
    options = {"mix": 0.5, "temperature": 0.5, "scale": 10.0}
    return DualHead(ImageClassifierSource(config=CONFIG).load(), "layers.1", **options)


def test_how_a_step_is_cut_is_inert():
    method, rows = DHO(), image_rows()
    nets = nets_of(method, student().double(), SmallCNN(5, seed=1))
    whole = step_gradient(method, nets, [range(8)], rows)
    assert whole["second"].any() and whole["module.classifier.weight"].any()
    for name, gradient in step_gradient(method, nets, PIECES, rows).items():
        assert_close(gradient, whole[name])


def test_the_losses_alone_say_which_head_they_are_of():
    rows = image_rows()
    for loss, silent in ((CrossEntropy(), "student.second"), (ForwardKL(), "student.module.classifier.weight")):
        method = DHO([loss])
        assert silent not in gradients(method, nets_of(method, student().double(), SmallCNN(5, seed=1)), rows)


def test_a_student_of_one_head_is_refused_with_what_to_write():
    method = DHO()
    with pytest.raises(ValueError, match="name: dual_head, of"):
        gradients(method, nets_of(method, SmallCNN(), SmallCNN()), image_rows())


def test_a_run_resumes_exactly(tmp_path):
    whole = trainer_of(DHO(), tmp_path / "whole", student)
    whole.train()
    trainer_of(DHO(), tmp_path / "cut", student, save_strategy="steps", save_steps=2).train()
    second = trainer_of(DHO(), tmp_path / "cut", student)
    second.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-2"))
    expected = whole.student.state_dict()
    for name, tensor in second.student.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
