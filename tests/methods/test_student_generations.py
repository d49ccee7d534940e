"""Generations of one student: guided by labels again, or anchored on a base; what the last one was is `previous`."""

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from kdlm import DistillTrainer
from kdlm.data import Collator
from kdlm.losses import JSD, CrossEntropy, ForwardKL, forward_kl, kept_rows, reverse_kl
from kdlm.methods import (
    GuidedGenerations,
    GuidedGenerationsSection,
    LogitKD,
    RecursiveKD,
    RecursiveKDSection,
    Step,
    TokenPSKD,
)
from kdlm.networks import Networks
from kdlm.signal import Rows, TopK
from kdlm.teachers import LocalTeacher, SelfTeacher

VOCAB, ACTIVE = 23, frozenset({"student"})


def model(seed: int, **sizes) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2} | sizes
    return LlamaForCausalLM(LlamaConfig(**{"vocab_size": VOCAB, "initializer_range": 0.3} | sizes))


def rows(count: int = 8, seed: int = 1) -> list[dict]:
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(VOCAB, (5 + i % 4,), generator=generator).tolist() for i in range(count)]
    return [{"input_ids": each, "labels": each} for each in ids]


def trainer(folder: Path, method, teacher=None, **options) -> DistillTrainer:
    args = TrainingArguments(
        output_dir=str(folder), report_to="none", use_cpu=True, disable_tqdm=True, save_strategy="no", seed=3,
        **{"max_steps": 4, "learning_rate": 0.01, "per_device_train_batch_size": 8, "lr_scheduler_type": "constant"}
        | options,
    )  # fmt: skip
    return DistillTrainer(model(0), teacher, args, method=method, train_dataset=rows(), eval_dataset=rows(4, seed=7))


def apart(method, teacher: Any = None) -> dict:
    """Return the networks of a method, in float64, `previous` pushed away from the student."""
    networks = Networks(model(0).double(), method, teacher)
    previous = networks.averages["previous"].double()
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in previous.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return networks.views


def logits_of(net, batch, kept: Rows):
    return kept.select(net.module(input_ids=batch["input_ids"]).logits)


def gradient(loss, nets) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, list(nets["student"].module.parameters()), allow_unused=True))


def at(done: int, epoch: int = 0) -> Step:
    return Step(done, 100, epoch, 0, 5)


# The labels again


def test_the_shares_go_by_generations_and_the_first_has_the_labels_alone():
    method = GuidedGenerations(label_share=[0.9, 0.5], generation_steps=10)
    assert [method.share(at(done)) for done in (0, 9)] == [0, 0]
    assert [method.share(at(done)) for done in (10, 19, 20, 35)] == pytest.approx([0.1, 0.1, 0.5, 0.5])
    by_epochs = GuidedGenerations(label_share=0.25)
    assert [by_epochs.share(at(3, epoch)) for epoch in (0, 1, 4)] == pytest.approx([0, 0.75, 0.75])


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_a_generation_has_the_gradient_of_a_run_taught_by_the_last_one_beside_the_labels(share: float):
    """Which is how a chain of recipes trains generations from fresh weights."""
    method = GuidedGenerations(label_share=share, generation_steps=2)
    nets, batch = apart(method), Collator(0)(rows(4))
    ours = method.losses(nets, batch, ACTIVE, at(2)).terms["token_loss"].sum
    chain = LogitKD([CrossEntropy(weight=share), ForwardKL(weight=1 - share)])
    teacher = nets | {"teacher": nets["previous"]}
    theirs = chain.losses(teacher, batch, ACTIVE, at(2)).terms["token_loss"].sum
    for a, b in zip(gradient(ours, nets), gradient(theirs, nets), strict=True):
        torch.testing.assert_close(a, b)


def test_shares_of_one_are_cross_entropy(tmp_path: Path):
    guided = trainer(tmp_path / "a", GuidedGenerations(label_share=1.0, generation_steps=1))
    plain = trainer(tmp_path / "b", LogitKD([CrossEntropy()]))
    for each in (guided, plain):
        each.train()
    for ours, theirs in zip(guided.student.parameters(), plain.student.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_previous_is_the_student_as_its_last_generation_ended(tmp_path: Path):
    long = trainer(tmp_path / "a", GuidedGenerations(generation_steps=2), max_steps=3)
    short = trainer(tmp_path / "b", GuidedGenerations(generation_steps=2), max_steps=2)
    for each in (long, short):
        each.train()
    previous = long.networks.averages["previous"].parameters()
    for kept, then, now in zip(previous, short.student.parameters(), long.student.parameters(), strict=True):
        assert torch.equal(kept, then)
        assert not torch.equal(kept, now) or not now.any()


def test_without_labels_a_regularised_student_forgets_them_and_with_some_it_does_not(tmp_path: Path):
    """Weight decay is what each generation adds; labels weigh against it again and again."""
    errors = {}
    for share in (0.0, 0.5):
        method = GuidedGenerations(label_share=share, generation_steps=20)
        run = trainer(
            tmp_path, method, max_steps=140, optim="adamw_torch", weight_decay=3.0,
            eval_strategy="steps", eval_steps=20,
        )  # fmt: skip
        run.eval_dataset = run.train_dataset
        run.train()
        errors[share] = [log["eval_cross_entropy"] for log in run.state.log_history if "eval_loss" in log]
    first = errors[0.0][0]
    assert errors[0.5][0] == pytest.approx(first)
    assert errors[0.0][-1] > first + 0.3
    assert errors[0.5][-1] < first + 0.1


def test_evaluation_gives_cross_entropy_beside_the_steps_own_loss(tmp_path: Path):
    figures = trainer(tmp_path, GuidedGenerations()).evaluate()
    assert figures["eval_cross_entropy"] == pytest.approx(figures["eval_guided"])  # in the first generation


# Anchored on a base


@pytest.mark.parametrize("anchor", [0.05, 0.3, 1.0])
def test_matching_the_target_in_every_generation_contracts_to_the_base(anchor: float):
    """KL is convex: KL((1 - a) p_n + a p_0 || p_0) <= (1 - a) KL(p_n || p_0); the fixed point is p_0."""
    generator = torch.Generator().manual_seed(5)
    base, current = ((3 * torch.randn(50, 11, generator=generator, dtype=torch.float64)).softmax(-1) for _ in range(2))
    start = (current * (current / base).log()).sum(-1)
    distance = start
    for _ in range(40):
        current = (1 - anchor) * current + anchor * base
        after = (current * (current / base).log()).sum(-1)
        assert (after <= (1 - anchor) * distance + 1e-15).all()
        distance = after
    assert (distance <= (1 - anchor) ** 40 * start + 1e-15).all()
    torch.testing.assert_close((1 - anchor) * base + anchor * base, base)


def test_the_first_generation_learns_from_the_base_and_the_next_from_the_mixture():
    base = LocalTeacher(model(2, hidden_size=24).double())
    method = RecursiveKD([ForwardKL(), JSD(weight=0.5)], anchor=0.3, generation_steps=2)
    nets, batch = apart(method, base), Collator(0)(rows(4))
    kept = kept_rows(batch["labels"])
    first, plain = (
        each.losses(nets, batch, ACTIVE, at(1)) for each in (method, LogitKD([ForwardKL(), JSD(weight=0.5)]))
    )
    torch.testing.assert_close(first.terms["token_loss"].sum, plain.terms["token_loss"].sum)
    p_n = logits_of(nets["previous"], batch, kept).softmax(-1)
    p_0 = kept.select(base.model(input_ids=batch["input_ids"]).logits).softmax(-1)
    target = (0.7 * p_n + 0.3 * p_0).log().detach()
    later = method.losses(nets, batch, ACTIVE, at(2))
    expected = forward_kl(logits_of(nets["student"], batch, kept), target).sum()
    torch.testing.assert_close(later.metrics["forward_kl"][0], expected.detach())


@pytest.mark.parametrize(("anchor", "who"), [(0.0, "previous"), (1.0, "teacher")])
def test_at_the_ends_of_the_range_one_of_the_two_is_the_target(anchor: float, who: str):
    base = LocalTeacher(model(2).double())
    method = RecursiveKD(anchor=anchor, generation_steps=2)
    nets, batch = apart(method, base), Collator(0)(rows(4))
    ours = method.losses(nets, batch, ACTIVE, at(5)).terms["token_loss"].sum
    plain = LogitKD([ForwardKL()]).losses(dict(nets) | {"teacher": nets[who]}, batch, ACTIVE, at(5))
    torch.testing.assert_close(ours, plain.terms["token_loss"].sum)
    for a, b in zip(gradient(ours, nets), gradient(plain.terms["token_loss"].sum, nets), strict=True):
        torch.testing.assert_close(a, b)


def test_evaluation_measures_against_the_base():
    base = LocalTeacher(model(2).double())
    method = RecursiveKD(anchor=0.3, generation_steps=2)
    nets, batch = apart(method, base), Collator(0)(rows(4))
    kept = kept_rows(batch["labels"])
    figures = method.evaluate(nets, batch, at(2)).metrics
    ours = logits_of(nets["student"], batch, kept).detach()
    p_0 = kept.select(base.model(input_ids=batch["input_ids"]).logits)
    torch.testing.assert_close(figures["kl_to_teacher"][0], forward_kl(ours, p_0).sum())
    torch.testing.assert_close(figures["reverse_kl_to_teacher"][0], reverse_kl(ours, p_0).sum())
    assert not torch.isclose(figures["forward_kl"][0], figures["kl_to_teacher"][0])


def distances(folder: Path, anchor: float) -> list[float]:
    """Return KL(student || start) on text that is not trained on, after each of five generations."""
    method = RecursiveKD(anchor=anchor, generation_steps=20)
    options = {"learning_rate": 0.003, "weight_decay": 0.3, "per_device_train_batch_size": 32, "max_steps": 100}
    run = trainer(folder, method, SelfTeacher("start"), **options)
    run.train_dataset = rows(96, seed=3)
    start, batch = model(0), Collator(0)(rows(16, seed=9))
    kept, found = kept_rows(batch["labels"]), []
    take = run.networks.take_snapshots

    def watched(done: int | None = None) -> None:
        take(done)
        if done is not None and done % 20 == 0:
            with torch.no_grad():
                pair = [kept.select(m(input_ids=batch["input_ids"]).logits) for m in (run.student, start)]
            found.append(reverse_kl(*pair).mean().item())

    run.networks.take_snapshots = watched
    run.train()
    return found


def test_five_generations_stay_near_their_base_when_anchored_and_leave_it_when_not(tmp_path: Path):
    """Weight decay makes each generation miss its target."""
    anchored, alone = distances(tmp_path / "a", 0.5), distances(tmp_path / "b", 0.0)
    assert len(anchored) == len(alone) == 5
    assert anchored[0] == pytest.approx(alone[0])  # the first has the base alone
    assert all(after > before for before, after in pairwise(alone))
    assert max(anchored[1:]) < anchored[0] < alone[-1] / 2


def test_a_base_that_gives_a_few_tokens_is_refused():
    method = RecursiveKD()
    few = TopK(torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, 1))
    nets = apart(method) | {"teacher": lambda batch, kept: few}
    with pytest.raises(ValueError, match=r"recursive_kd averages whole distributions .* gives a TopK signal"):
        method.losses(nets, Collator(0)(rows(2)), ACTIVE, at(0))


def test_sections_build_their_methods_and_refuse_what_does_nothing():
    built = GuidedGenerationsSection(label_share=[0.5, 0.25], generation_steps=3).build([], None)
    assert built.label_shares == [0.5, 0.25] and built.generations.steps == 3
    assert GuidedGenerationsSection(label_share=1).build([], None).label_shares == [1]
    assert set(RecursiveKDSection(anchor=0.2).build([], None).token_losses) == {"forward_kl"}
    assert set(RecursiveKDSection().build([JSD()], None).token_losses) == {"jsd"}
    with pytest.raises(ValueError, match="guided_generations has a loss of its own"):
        GuidedGenerationsSection().build([CrossEntropy()], None)
    for shares in ([], [1.5], -0.1):
        with pytest.raises(ValueError, match="label_share"):
            GuidedGenerationsSection(label_share=shares)
    assert math.isclose(TokenPSKD().end, 0.8)
