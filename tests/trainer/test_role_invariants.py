"""What holds of several roles under one optimiser, whatever the method: each broke in a peer."""

import io
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from forks import on_ranks
from rich.console import Console
from role_models import Turns, adam_steps, samples, tied, weights
from safetensors.torch import load_file
from torch import nn
from two_ranks_roles import everything, made

from kdlm import DistillTrainer
from kdlm.methods import Terms, Trainable
from kdlm.networks import role_plan
from kdlm.progress import Display


def trainer(arguments, method: Turns | None = None, **options) -> DistillTrainer:
    options = {"optim": "adamw_torch", "learning_rate": 0.01, "per_device_train_batch_size": 4, **options}
    return DistillTrainer(tied(1), None, arguments(**options), method=method or Turns(), train_dataset=samples())


def watched(run: DistillTrainer, look) -> None:
    """Call `look(step)` when an optimiser step is done and its averages are moved."""
    after = run._after_step

    def then() -> None:
        after()
        look(run.state.global_step)

    run._after_step = then


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))


def test_the_decay_of_an_average_is_per_step_of_the_role_that_it_follows(arguments) -> None:
    run = trainer(arguments, max_steps=7)
    expected, moves = {k: v.float() for k, v in weights(run.student).items()}, []

    def follow(step: int) -> None:
        if step % 3 == 1:  # steps 1, 4, 7 are the student's
            for name, value in weights(run.student).items():
                expected[name] = 0.7 * expected[name] + 0.3 * value.float()
        ours = weights(run.networks.averages["average"])
        moves.append(all(torch.allclose(ours[k], v, rtol=1e-6, atol=1e-7) for k, v in expected.items()))

    watched(run, follow)
    run.train()
    assert moves == [True] * 7


def test_adam_and_the_schedule_count_a_roles_own_steps(arguments) -> None:
    run = trainer(arguments, max_steps=9, lr_scheduler_type="linear", warmup_steps=0)
    rates: dict[str, list[float]] = {"student": [], "critic": []}
    step = run.create_optimizer().step

    def look(*args, **kwargs):
        for group in run.optimizer.param_groups:
            if group["role"] in run.method.active(run.state.global_step) and group["params"]:
                rates[group["role"]].append(group["lr"])
        return step(*args, **kwargs)

    run.optimizer.step = look
    run.train()
    assert adam_steps(run) == {"student": {3}, "critic": {6}}
    assert sorted(set(rates["student"]), reverse=True) == pytest.approx([0.01 * (3 - i) / 3 for i in range(3)])
    assert sorted(set(rates["critic"]), reverse=True) == pytest.approx([0.02 * (6 - i) / 6 for i in range(6)])


def test_a_role_that_rests_has_no_gradient_and_does_not_move(arguments) -> None:
    run = trainer(arguments, max_steps=6, weight_decay=0.1)
    step, seen = run.create_optimizer().step, []

    def look(*args, **kwargs):
        active = run.method.active(run.state.global_step)
        before = {name: weights(module) for name, module in run.networks.role.items()}
        with_gradient = {n for n, m in run.networks.role.items() if any(p.grad is not None for p in m.parameters())}
        result = step(*args, **kwargs)
        after = {name: weights(module) for name, module in run.networks.role.items()}
        moved = {n for n in before if any(not torch.equal(before[n][k], after[n][k]) for k in before[n])}
        seen.append((active, with_gradient, moved))
        return result

    run.optimizer.step = look
    run.train()
    assert len(seen) == 6 and all(active == gradient == moved for active, gradient, moved in seen)


def test_each_roles_gradient_norm_is_logged_before_it_is_clipped(arguments) -> None:
    free, clipped = (trainer(arguments, max_steps=2, max_grad_norm=norm) for norm in (1e9, 1e-3))
    for run in (free, clipped):
        run.train()
    lines = [[line for line in run.state.log_history if "loss" in line] for run in (free, clipped)]
    assert all("grad_norm/student" in line for line in lines[0]) and "grad_norm/critic" not in lines[0][0]
    assert lines[0][1]["grad_norm/critic"] > 1e-2
    assert lines[1][0]["grad_norm/student"] == pytest.approx(lines[0][0]["grad_norm/student"])


@pytest.mark.parametrize("start", [2, 4, 5])
def test_averages_snapshots_and_state_resume_bit_for_bit(arguments, tmp_path: Path, start: int) -> None:
    """Three epochs of two steps: a snapshot was taken at steps 2 and 4, a resumed run is in the midst of an epoch."""
    whole = trainer(arguments, max_steps=6, save_strategy="steps", save_steps=1)
    whole.train()
    resumed = trainer(arguments, max_steps=6, output_dir=str(tmp_path / "resumed"))
    assert not same(resumed.networks.averages["average"], whole.networks.averages["average"])
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{start}"))
    for name, module in {**whole.networks.role, **whole.networks.averages}.items():
        assert same(module, resumed.networks.module_of(name)), name
    assert adam_steps(resumed) == adam_steps(whole)
    assert resumed.method.seen == whole.method.seen == 6


def test_a_snapshot_is_the_student_at_the_end_of_the_last_epoch(arguments) -> None:
    run = trainer(arguments, max_steps=4)
    taken: dict[int, dict] = {}
    watched(run, lambda step: taken.update({step: weights(run.student)}))
    run.train()
    before = weights(run.networks.averages["before"])
    assert all(torch.equal(before[name], value.float()) for name, value in taken[4].items())
    run = trainer(arguments, max_steps=5)
    watched(run, lambda step: taken.update({step: weights(run.networks.averages["before"])}))
    run.train()
    assert any(not torch.equal(taken[2][k], taken[3][k]) for k in taken[2])
    assert all(torch.equal(taken[3][k], taken[4][k]) for k in taken[3])


def test_a_checkpoint_keeps_tied_weights_and_the_methods_state_out_of_the_student(arguments, tmp_path: Path) -> None:
    run = trainer(arguments, max_steps=3, save_strategy="steps", save_steps=3)
    run.train()
    checkpoint = tmp_path / "run" / "checkpoint-3"
    stored = load_file(checkpoint / "model.safetensors")
    assert set(stored) == {"first.weight", "first.bias", "second.bias", "scale"}  # one matrix, and nothing of a method
    assert load_file(checkpoint / "kdlm" / "method_state.safetensors")["seen"] == 3
    auxiliary = {file.stem for file in (checkpoint / "kdlm").glob("*.safetensors")}
    assert auxiliary == {"critic", "average", "before", "method_state"}
    fresh = trainer(arguments)
    fresh._load_from_checkpoint(str(checkpoint))
    for name in ("student", "critic", "average", "before"):
        module = fresh.networks.module_of(name)
        assert same(module, run.networks.module_of(name)) and module.first.weight is module.second.weight


def test_students_of_two_checkpoints_differ_when_the_student_moved_in_between(arguments, tmp_path: Path) -> None:
    trainer(arguments, max_steps=5, save_strategy="steps", save_steps=1).train()
    found = [load_file(tmp_path / "run" / f"checkpoint-{step}" / "model.safetensors") for step in range(1, 6)]
    changed = [any(not torch.equal(a[k], b[k]) for k in a) for a, b in pairwise(found)]
    assert changed == [False, False, True, False]


def test_the_plan_of_roles_is_shown_at_the_start(arguments) -> None:
    run = trainer(arguments, max_steps=7)
    written = io.StringIO()
    run.add_callback(Display(Console(file=written, width=200), plan=lambda total: role_plan(run.method, total)))
    run.train()
    assert written.getvalue().splitlines()[:4] == [
        "student: moves in 3 of 7 steps",
        "critic: moves in 4 of 7 steps, first at step 2",
        "average: average of student, decay 0.7 a step of its own",
        "before: copy of student, taken at the end of every epoch",
    ]


class Forgetful(Turns):
    """Never computes the critic's term, though it announces it."""

    def losses(self, *args) -> Terms:
        found = super().losses(*args).terms
        return Terms({"student": found.get("student", found.get("critic"))})


def test_a_role_that_never_moves_and_a_term_that_is_never_computed_are_errors(arguments) -> None:
    with pytest.raises(ValueError, match="the role 'critic' is not active in any of the 1 steps"):
        trainer(arguments, max_steps=1).train()
    with pytest.raises(ValueError, match="Forgetful: the term 'critic' was not computed in any step"):
        trainer(arguments, Forgetful(), max_steps=3).train()


def test_settings_of_one_role_do_not_reach_another(arguments) -> None:
    method = Turns()
    critic = Trainable(Turns.roles["critic"].make, betas=(0.0, 0.9), weight_decay=0.3)
    method.roles = {**Turns.roles, "critic": critic}
    groups = trainer(arguments, method, weight_decay=0.1).create_optimizer().param_groups
    settings = {(g["role"], g["weight_decay"], g["betas"], g["lr"]) for g in groups if g["params"]}
    run, own = (0.9, 0.999), (0.0, 0.9)
    assert settings == {
        ("student", 0.1, run, 0.01), ("student", 0.0, run, 0.01), ("critic", 0.3, own, 0.01), ("critic", 0.0, own, 0.01)
    }  # fmt: skip


def test_two_ranks_with_roles_that_take_turns_equal_one_process(tmp_path: Path) -> None:
    """Under DDP, and under FSDP2 with several roles in one parent: 2 x 4 samples against 1 x 8."""
    on_ranks(2, Path(__file__).with_name("two_ranks_roles.py"), tmp_path)
    run = made(tmp_path, batch=8)
    start = everything(run)
    run.train()
    for kind in ("ddp", "fsdp"):
        got = load_file(tmp_path / f"{kind}.safetensors")
        for name, value in everything(run).items():
            torch.testing.assert_close(got[name], value, rtol=1e-6, atol=1e-6, msg=f"{kind}: {name}")
    assert all(any(not torch.equal(start[n], v) for n, v in got.items() if role in n) for role in ("student", "fake"))
