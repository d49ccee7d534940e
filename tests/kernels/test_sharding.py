"""Heads in pieces give what whole ones give: slices of the vocabulary, FSDP2's DTensors, ZeRO-3's partitions."""

import os
import subprocess
import sys
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from kdlm_kernels import linear_divergence, linear_logprobs, linear_topk_divergence
from torch import nn


def failures(folder: Path, *parts: str) -> dict[str, str]:
    """Run parts of `ranks.py` on two gloo ranks and return what failed there."""
    script = Path(__file__).with_name("ranks.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    subprocess.run([*command, str(folder), *parts], check=True, timeout=240, env=environment)
    return {part: "".join((folder / f"{part}.{rank}").read_text() for rank in range(2)) for part in parts}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What failed in the parts that need torch alone; starting ranks takes most of the time."""
    return failures(tmp_path_factory.mktemp("ranks"), "slices", "fsdp2")


def test_slices_of_the_vocabulary_give_what_whole_heads_give(found: dict[str, str]) -> None:
    assert not found["slices"], found["slices"]


def test_a_dtensor_head_outside_of_its_module_gets_the_gradient_that_fsdp2_gives(found: dict[str, str]) -> None:
    assert not found["fsdp2"], found["fsdp2"]


@pytest.mark.slow
@pytest.mark.timeout(600)  # the first of all waits for DeepSpeed's extension to be compiled
@pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed")
def test_deepspeed_partitions_give_what_whole_heads_give(tmp_path: Path) -> None:
    found = failures(tmp_path, "zero3")["zero3"]
    assert not found, found


def partition(weight: torch.Tensor, *, trained: bool) -> nn.Parameter:
    """Return what DeepSpeed leaves of a parameter outside of forward and backward: attributes without elements."""
    parameter = nn.Parameter(weight.new_empty(0), requires_grad=trained)
    parameter.ds_id, parameter.ds_numel, parameter.ds_shape = 0, weight.numel(), weight.shape
    return parameter


@pytest.mark.parametrize("function", [linear_divergence, linear_topk_divergence, linear_logprobs])
def test_a_trained_partition_is_refused_with_the_way_out(function) -> None:
    head, hidden, ids = partition(torch.randn(7, 4), trained=True), torch.randn(3, 4), torch.zeros(3, 1).long()
    rest = {
        linear_divergence: (torch.randn(3, 5), torch.randn(7, 5)),
        linear_topk_divergence: (ids, ids.float().sub(1)),
        linear_logprobs: (ids,),
    }
    with pytest.raises(ValueError, match=r"deepspeed\.zero\.register_external_parameter\(module, head\.weight\)"):
        function(hidden, head, *rest[function])


@pytest.mark.parametrize("sweeps", [1, 2])
def test_partitions_without_gradient_are_gathered_once_per_sweep_and_let_go(
    monkeypatch: pytest.MonkeyPatch, sweeps: int
) -> None:
    weights = torch.randn(7, 4), torch.randn(7, 5)
    heads = [partition(weights[0], trained=False), partition(weights[1], trained=True)]  # nobody trains a teacher here
    gathered = []

    @contextmanager
    def gather(parameters):
        gathered.append(len(parameters))
        for parameter, weight in zip(parameters, weights, strict=False):
            parameter.data = weight
        yield
        for parameter in parameters:
            parameter.data = parameter.data.new_empty(0)

    stand_in = SimpleNamespace(zero=SimpleNamespace(GatheredParameters=gather))
    monkeypatch.setitem(sys.modules, "deepspeed", stand_in)
    factors = torch.ones(3) if sweeps == 1 else torch.tensor([1.0, 2.0, 0.5])  # backward sweeps again if they differ
    theirs, grads = torch.randn(3, 5), []
    hidden = torch.randn(3, 4, requires_grad=True)
    for student, teacher in (weights, heads):
        values = linear_divergence(hidden, student, theirs, teacher)
        grads.append(torch.autograd.grad((values * factors).sum(), hidden)[0])
    torch.testing.assert_close(grads[1], grads[0])
    assert gathered == [2] * sweeps
    assert not any(head.numel() for head in heads)
