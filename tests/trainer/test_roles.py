"""Several networks under one optimiser: who moves when, at which rate, and what is saved with whom."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import rows, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM

from kdlm import DistillTrainer
from kdlm.losses import ForwardKL, kept_rows
from kdlm.methods import EmaOf, HiddenKD, LogitKD, Method, Step, Term, Terms, Trainable
from kdlm.models.prediction import Predictor
from kdlm.networks import own_steps


class Alternating(Method):
    """The student moves at even steps, a critic at odd ones; an average follows the student."""

    roles = {
        "student": Trainable(),
        "critic": Trainable(make=lambda student, teacher: nn.Linear(student.hidden_size, 1), learning_rate=0.5),
        "average": EmaOf("student", decay=0.9),
    }

    def active(self, step: int) -> frozenset[str]:
        return frozenset({"critic"} if step % 2 else {"student"})

    def losses(self, nets, batch, active, step: Step) -> Terms:
        signal = nets["student"](batch, kept_rows(batch["labels"]))
        score = nets["critic"](signal.hidden).squeeze(-1)
        return Terms({"score": Term(score.square().sum()), "size": Term(signal.hidden.square().sum(), weight=0.1)})

    def evaluate(self, nets, batch, step: Step) -> Terms:
        return self.losses(nets, batch, frozenset(), step)


class InTwo(LogitKD):
    """The same loss, given out as two halves with a backward pass each."""

    def losses(self, nets, batch, active, step: Step) -> Iterator[Terms]:
        for more in (True, False):
            whole = super().losses(nets, batch, active, step)
            yield Terms({"half": Term(whole.terms["token_loss"].sum, weight=0.5)}, more=more)


def trainer(arguments, method: Method, steps: int = 1, **options) -> DistillTrainer:
    torch.manual_seed(5)
    return DistillTrainer(
        tiny_model(1), tiny_model(2, hidden=24, layers=3), arguments(max_steps=steps, **options), method=method,
        train_dataset=rows([5, 11, 3, 17, 8, 2, 13, 9]), eval_dataset=rows([6, 4], seed=3),
    )  # fmt: skip


def weights(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def moved(before: dict, after: dict) -> bool:
    return any(not torch.equal(before[name], after[name]) for name in before)


def test_only_the_active_role_moves_and_the_average_follows_it(arguments) -> None:
    run = trainer(arguments, Alternating(), steps=2)
    seen = []

    def look(*args, **kwargs):
        nets = run.networks
        seen.append([weights(nets.student), weights(nets.role["critic"]), weights(nets.averages["average"])])

    look()
    after = run._after_step
    run._after_step = lambda: (after(), look())
    run.train()
    start, even, odd = seen
    assert moved(start[0], even[0]) and not moved(start[1], even[1]) and moved(start[2], even[2])
    assert not moved(even[0], odd[0]) and moved(even[1], odd[1]) and not moved(even[2], odd[2])
    name = next(iter(start[0]))
    torch.testing.assert_close(even[2][name], 0.9 * start[0][name] + 0.1 * even[0][name])


def test_groups_carry_their_role_and_its_own_learning_rate(arguments) -> None:
    run = trainer(arguments, Alternating())
    groups = run.create_optimizer().param_groups
    assert {group["role"]: group["lr"] for group in groups} == {"student": 0.1, "critic": 0.5}
    assert sum(len(group["params"]) for group in groups) == sum(1 for _ in run.networks.parameters())


def test_each_role_counts_its_schedule_in_its_own_steps(arguments) -> None:
    count = own_steps(Alternating(), "critic")
    assert [count(step) for step in range(6)] == [0, 0, 1, 1, 2, 2]
    run = trainer(arguments, Alternating(), steps=4, lr_scheduler_type="linear", warmup_steps=0)
    run.create_optimizer()
    scheduler = run.create_scheduler(4)
    rates = []
    for _ in range(4):
        rates.append(next(rate for group, rate in zip(run.optimizer.param_groups, scheduler.get_last_lr(), strict=True)
                      if group["role"] == "critic"))  # fmt: skip
        run.optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([0.5, 0.5, 0.25, 0.25])


def test_several_terms_have_a_backward_pass_each_and_the_same_gradient(arguments) -> None:
    whole, halves = trainer(arguments, LogitKD([ForwardKL()])), trainer(arguments, InTwo([ForwardKL()]))
    whole.train()
    halves.train()
    for name, weight in weights(whole.student).items():
        torch.testing.assert_close(weights(halves.student)[name], weight, rtol=1e-4, atol=1e-6)


def test_each_role_is_clipped_to_its_own_norm(arguments) -> None:
    method = Alternating()
    method.roles = {**Alternating.roles, "critic": Trainable(make=Alternating.roles["critic"].make, max_grad_norm=1e-3)}
    method.active = lambda step: frozenset({"student", "critic"})
    run = trainer(arguments, method, max_grad_norm=0.5)
    norms = {}
    step = run.create_optimizer().step

    def look(*args, **kwargs):
        for name, module in run.networks.role.items():
            norms[name] = torch.stack([p.grad.norm() for p in module.parameters() if p.grad is not None]).norm().item()
        return step(*args, **kwargs)

    run.optimizer.step = look
    run.train()
    assert norms["critic"] == pytest.approx(1e-3, rel=1e-3)
    assert norms["student"] == pytest.approx(0.5, rel=1e-3)


def test_projectors_train_and_are_checkpointed_but_not_exported(arguments, tmp_path: Path) -> None:
    run = trainer(arguments, HiddenKD([ForwardKL()], layers=[(0, 1), (1, 2)]), save_strategy="steps", save_steps=1)
    before = weights(run.networks.role["projectors"])
    run.train()
    after = weights(run.networks.role["projectors"])
    assert moved(before, after)
    checkpoint = tmp_path / "run" / "checkpoint-1"
    saved = load_file(checkpoint / "kdlm" / "projectors.safetensors")
    assert all(torch.equal(saved[name], weight) for name, weight in after.items())
    run.save_model(str(tmp_path / "student"))
    assert not (tmp_path / "student" / "kdlm").exists()
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    assert {name for name, _ in exported.named_parameters()} == set(weights(run.student))


def test_a_log_line_holds_the_means_of_its_own_steps_in_a_second_run_too(arguments) -> None:
    run = trainer(arguments, LogitKD([ForwardKL()]), steps=3, logging_steps=2)  # the third step gets no line
    for _ in range(2):
        run.train()
        (line,) = (line for line in run.state.log_history if "loss" in line)
        assert line["forward_kl"] == pytest.approx(line["loss"])


@pytest.mark.parametrize("losses", [[], [ForwardKL(weight=2.0)]], ids=["alone", "beside a token loss"])
def test_evaluation_reports_the_hidden_state_term_as_training_does(arguments, losses) -> None:
    run = trainer(arguments, HiddenKD(losses, layers=[(0, 1), (1, 2)], weight=3.0))
    before = run.evaluate(run.train_dataset)
    run.train()
    logged = next(line for line in run.state.log_history if "loss" in line)  # of the weights before the step
    names = {"loss", "hidden", *(loss.name for loss in losses)}
    assert {name: before[f"eval_{name}"] for name in names} == pytest.approx({name: logged[name] for name in names})
    assert before["eval_kl_to_teacher"] > 0


def test_a_hidden_state_term_alone_brings_student_layers_to_the_teachers(arguments) -> None:
    run = trainer(
        arguments, HiddenKD(distance="mse", layers=[(1, 2)]), steps=30, optim="adamw_torch", learning_rate=1e-2,
        logging_steps=30,
    )  # fmt: skip
    run.args.logging_steps = 1
    run.train()
    curve = [line["loss"] for line in run.state.log_history if "loss" in line]
    assert curve[-1] < 0.5 * curve[0]


def test_a_bf16_student_has_fp32_projectors() -> None:
    method, student, teacher = (
        HiddenKD(layers=[(1, 1)]),
        Predictor(tiny_model(0).bfloat16()),
        Predictor(tiny_model(1, hidden=32).bfloat16()),
    )
    projectors = method.roles["projectors"].make(student, teacher)
    batch = {"input_ids": torch.arange(6)[None], "labels": torch.arange(6)[None]}
    nets = {"student": student, "teacher": teacher, "projectors": projectors}
    method.losses(nets, batch, frozenset({"student", "projectors"}), Step(0, 1)).terms["hidden"].sum.backward()
    assert projectors[0].weight.grad.dtype == torch.float32 and projectors[0].weight.grad.abs().sum() > 0


def test_a_layer_that_does_not_exist_is_refused_by_name(arguments) -> None:
    with pytest.raises(ValueError, match=r"method\.layers: \[0, 7\].*teacher 3"):
        trainer(arguments, HiddenKD(layers=[(0, 7)]))


def test_a_method_without_its_teacher_is_refused(arguments) -> None:
    with pytest.raises(ValueError, match="LogitKD needs teacher, but no teacher was given"):
        DistillTrainer(tiny_model(1), None, arguments(), train_dataset=rows([3]))
