"""What the engine `vllm` refuses before it starts; what it does then is in test_rollouts_with_vllm.py."""

import sys
from typing import Any

import pytest
import torch

from kdlm.rollouts.vllm_local import VLLMSection, own_randomness

CPU = torch.device("cpu")
student: Any = None


def test_what_cannot_work_is_refused_by_its_key() -> None:
    with pytest.raises(ValueError, match=r"rollouts\.engine\.sleep: .*the student is on cpu"):
        VLLMSection(sleep=True).build(student, None, CPU)
    with pytest.raises(ValueError, match=r"rollouts\.engine\.sleep: .*asynchronous draws then"):
        VLLMSection(sleep=True).build(student, None, torch.device("cuda"), copied=True)
    for option in ("tensor_parallel_size", "logprobs_mode"):
        with pytest.raises(ValueError, match=rf"rollouts\.engine\.options: {option} cannot be set"):
            VLLMSection(options={option: 2, "enforce_eager": True}).build(student, None, CPU)


def test_without_vllm_the_line_that_installs_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    with pytest.raises(ValueError, match=r"pip install 'kdlm\[vllm\]'"):
        VLLMSection().build(student, None, CPU)


def test_the_runs_random_numbers_are_put_back() -> None:
    import random

    import numpy

    def three() -> list[float]:
        return [random.random(), float(numpy.random.rand()), float(torch.rand(()))]

    def seed() -> None:
        random.seed(1), numpy.random.seed(1), torch.manual_seed(1)

    seed()
    expected = three()
    seed()
    with own_randomness():
        torch.manual_seed(5)
        three()
    assert three() == expected
