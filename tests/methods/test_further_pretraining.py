"""Further pre-training with self-distillation: language modelling beside an anchor on last hidden states."""

from pathlib import Path

import pytest
import torch
from torch.autograd import gradcheck
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from kdlm import DistillTrainer
from kdlm.data import Collator
from kdlm.losses import CrossEntropy, kept_rows
from kdlm.methods import FurtherPretraining, FurtherPretrainingSection, LogitKD, SequenceKD, Step
from kdlm.networks import Networks
from kdlm.signal import IGNORE_INDEX, Head, Hidden
from kdlm.teachers import LocalTeacher

VOCAB, WIDTH = 23, 16
ACTIVE, STEP = frozenset({"student"}), Step(0, 8)


def model(seed: int, width: int = WIDTH) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": width, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, initializer_range=0.3, **sizes))


def rows(count: int = 8, seed: int = 1) -> list[dict]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for number in range(count):
        ids = torch.randint(VOCAB, (5 + number % 4,), generator=generator).tolist()
        made.append({"input_ids": ids, "labels": [IGNORE_INDEX, IGNORE_INDEX, *ids[2:]] if number % 3 == 0 else ids})
    return made


def trainer(folder: Path, method, student=None, teacher=None, **options) -> DistillTrainer:
    args = TrainingArguments(
        output_dir=str(folder), report_to="none", use_cpu=True, disable_tqdm=True, save_strategy="no", seed=3,
        **{"max_steps": 4, "learning_rate": 0.01, "per_device_train_batch_size": 8, "lr_scheduler_type": "constant"}
        | options,
    )  # fmt: skip
    made = student if student is not None else model(0)
    return DistillTrainer(made, teacher, args, method=method, train_dataset=rows(), eval_dataset=rows(4, seed=7))


def nets_of(method, student, teacher) -> dict:
    return Networks(student, method, LocalTeacher(teacher)).views


def states(net, batch):
    return net.base_model(input_ids=batch["input_ids"]).last_hidden_state


@pytest.mark.parametrize("over", ["tokens", "sequences"])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_the_anchor_is_the_squared_distance_of_last_hidden_states(over: str, reduction: str):
    method = FurtherPretraining(weight=0.7, over=over, reduction=reduction)
    student, teacher = model(0).double(), model(1).double()
    batch = Collator(0)(rows(5))
    terms = method.losses(nets_of(method, student, teacher), batch, ACTIVE, STEP)
    kept = batch["labels"][:, 1:] != IGNORE_INDEX
    far = (states(student, batch) - states(teacher, batch))[:, :-1]
    if over == "tokens":
        expected = far.square().sum(-1)[kept].sum()
    else:
        expected = sum(row[at].mean(0).square().sum() for row, at in zip(far, kept, strict=True))
    expected = expected if reduction == "sum" else expected / WIDTH
    anchor = terms.terms["anchor"]
    torch.testing.assert_close(anchor.sum, expected)
    assert (anchor.unit, anchor.weight) == (over, 0.7)
    assert method.counts(batch)["sequences"] == 5 and method.counts(batch)["tokens"] == kept.sum()


@pytest.mark.parametrize("over", ["tokens", "sequences"])
def test_the_anchors_gradient_is_that_of_differences(over: str):
    method, batch = FurtherPretraining(over=over), Collator(0)(rows(3))
    count = len(kept_rows(batch["labels"]))
    hidden, theirs = torch.randn(2, count, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    head = Head(torch.eye(VOCAB, 4).double())

    def anchor(ours):
        nets = {"student": lambda *_: Hidden(ours, head), "teacher": lambda *_: Hidden(theirs, head)}
        return method.losses(nets, batch, ACTIVE, STEP).terms["anchor"].sum

    theirs.requires_grad_()
    assert gradcheck(anchor, hidden.requires_grad_())
    anchor(hidden).backward()
    assert theirs.grad is None


def test_a_teacher_that_is_the_student_gives_no_anchor_and_no_gradient():
    method = FurtherPretraining()
    student = model(0)
    batch = Collator(0)(rows())
    anchor = method.losses(nets_of(method, student, model(0)), batch, ACTIVE, STEP).terms["anchor"].sum
    assert anchor == 0
    grads = torch.autograd.grad(anchor, list(student.parameters()), allow_unused=True)
    assert not any(grad.any() for grad in grads if grad is not None)


def test_without_weight_it_is_further_pretraining_to_the_last_bit(tmp_path: Path):
    ours = trainer(tmp_path / "ours", FurtherPretraining(weight=0.0), teacher=model(1))
    plain = trainer(tmp_path / "plain", SequenceKD([CrossEntropy()]))
    for each in (ours, plain):
        each.train()
    for one, other in zip(ours.student.parameters(), plain.student.parameters(), strict=True):
        assert torch.equal(one, other)


def test_the_student_ends_nearer_to_the_initial_weights_than_its_teacher_and_learns_all_the_same(tmp_path: Path):
    """Both stages in a row: the teacher begins from the initial weights, and so does the student."""
    options = {"max_steps": 30, "learning_rate": 0.003}
    first = trainer(tmp_path / "teacher", LogitKD([CrossEntropy()]), **options)
    first.train()
    second = trainer(tmp_path / "student", FurtherPretraining(), teacher=first.student, **options)
    assert all(torch.equal(a, b) for a, b in zip(second.student.parameters(), model(0).parameters(), strict=True))
    before = second.evaluate(second.train_dataset)
    second.train()
    after = second.evaluate(second.train_dataset)
    initial = torch.cat([p.flatten() for p in model(0).parameters()])
    far = [torch.cat([p.detach().flatten() for p in m.parameters()]).sub(initial).norm() for m in
           (second.student, first.student)]  # fmt: skip
    assert far[0] < far[1]
    assert after["eval_cross_entropy"] < before["eval_cross_entropy"] and after["eval_anchor"] < before["eval_anchor"]


def test_a_teacher_of_another_width_or_of_logits_alone_is_refused():
    method, batch = FurtherPretraining(), Collator(0)(rows(2))
    with pytest.raises(ValueError, match="32 wide and the student's 16: further_pretraining takes the student's own"):
        method.losses(nets_of(method, model(0), model(1, 32)), batch, ACTIVE, STEP)
    nets = Networks(model(0), method, LocalTeacher(model(1), signal="dense")).views
    with pytest.raises(ValueError, match=r"teacher: further_pretraining reads last hidden states.*teacher.signal"):
        method.losses(nets, batch, ACTIVE, STEP)


def test_the_recipes_losses_stand_in_for_cross_entropy_and_rows_without_labels_are_inert():
    assert set(FurtherPretrainingSection().build([], None).token_losses) == {"cross_entropy"}
    method = FurtherPretrainingSection(over="sequences").build([], None)
    nets = nets_of(method, model(0), model(1))
    silent = [{**row, "labels": [IGNORE_INDEX] * len(row["labels"])} for row in rows(2, seed=5)]
    alone, beside = (Collator(0)(data) for data in (rows(3), rows(3) + silent))
    assert method.counts(alone)["sequences"] == method.counts(beside)["sequences"] == 3
    values = [method.losses(nets, batch, ACTIVE, STEP).terms["anchor"].sum for batch in (alone, beside)]
    torch.testing.assert_close(*values)
    nothing = Collator(0)(silent)
    assert method.losses(nets, nothing, ACTIVE, STEP).terms["anchor"].sum == 0
    assert len(kept_rows(nothing["labels"])) == 0
