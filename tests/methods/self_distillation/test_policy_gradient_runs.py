"""Runs of `policy_gradient`: they resume exactly, alone and beside a divergence to a told self."""

import pytest
import torch
from self_attempts import trainer, weights

from kdlm.losses import ReverseKL
from kdlm.methods import RewardMethod
from kdlm.teachers import SelfTeacher


@pytest.mark.parametrize("told", [False, True])
def test_a_policy_gradient_run_that_is_killed_ends_as_an_unbroken_one(tmp_path, told: bool) -> None:
    options = {"samples": 3, "save_strategy": "steps", "save_steps": 2}
    if told:
        options |= {"columns": lambda number: {"context_prompt": [7, 8, number + 9]}}

    def made(folder: str):
        method = RewardMethod([ReverseKL()] if told else [], scaled=True)
        return trainer(tmp_path / folder, method, SelfTeacher("average", decay=0.9) if told else None, **options)

    whole = weights(made("a"))
    made("b").train()
    resumed = made("b")
    start = {name: p.detach().clone() for name, p in resumed.student.named_parameters()}
    resumed.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-4"))
    after = dict(resumed.student.named_parameters())
    assert all(torch.equal(after[name].detach(), whole[name]) for name in whole)
    assert any(not torch.equal(whole[name], start[name]) for name in whole)


def test_equal_rewards_move_nothing(tmp_path) -> None:
    made = trainer(tmp_path, RewardMethod(scaled=True), samples=3, reward=lambda texts, rows: [0.3] * len(texts))
    before = {name: p.detach().clone() for name, p in made.student.named_parameters()}
    assert all(torch.equal(after, before[name]) for name, after in weights(made).items())
