"""UniSD: with all components off it is SDFT, each trains by itself, and weights of whole sequences do not cancel."""

import json
import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from self_attempts import trainer, weights

from kdlm.data import Collator, ContextCollator, ContextSection, Reprompt
from kdlm.losses import ForwardKL, kept_rows
from kdlm.methods import SelfDistillation, Step, UniSD, UniSDSection
from kdlm.methods.self_distillation.agreement import Agreement, Quantile, agreement_weights, disagreement
from kdlm.methods.self_distillation.unisd import Contrast
from kdlm.signal import Dense, Head, Hidden
from kdlm.teachers.local import own_reading

STEP = Step(0, 10)
VOCAB = 128
LIKE, UNLIKE = ["pick", "pick", "pick"], ["pick", "zebra", "quiz"]


def told(number: int) -> dict[str, Any]:
    """A row's contexts for a run: three that differ, a good one and a bad one."""
    return {"context": f"def f{number}", "contexts": json.dumps(["a", f"b{number}", "cd"]), "bad_context": "import x"}


class Letters:
    """A tokenizer whose tokens are letters."""

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text]}


class Pooled:
    """A model whose next token follows from all that it has read: hidden states are running means of embeddings."""

    def __init__(self, seed: int, *, told: bool = True):
        self.told = told
        draw = torch.Generator().manual_seed(seed)
        self.embed = torch.randn(VOCAB, 6, generator=draw, dtype=torch.float64).requires_grad_()
        self.head = Head(torch.randn(VOCAB, 6, generator=draw, dtype=torch.float64))

    def __call__(self, batch, rows):
        if self.told and "theirs" in batch:
            batch, rows = own_reading(batch, rows)
        read = self.embed[batch["input_ids"]].cumsum(1)
        mean = read / torch.arange(1, read.shape[1] + 1)[None, :, None]
        return Hidden(rows.select(mean), self.head)


def batch_of(contexts: list[list[str]], bad: list[str] | None = None, good: str = "ok") -> dict[str, Any]:
    reprompt = Reprompt(Letters(), ContextSection(template="{context}{prompt}"))  # type: ignore[arg-type]
    reprompt.__dict__["_leading"] = []
    rows = []
    for number, several in enumerate(contexts):
        ids = [ord(letter) for letter in f"x{'abcdef'[: 3 + number]}"]
        rows.append(
            {"input_ids": ids, "labels": [-100, *ids[1:]], "asked": '{"prompt": "x"}', "context": good, "index": number}
            | ({"contexts": several} if several else {})
            | ({"bad_context": bad[number]} if bad else {})
        )
    return ContextCollator(Collator(0), reprompt)(rows)


def run(method: Any, batch: dict[str, Any], student: Any = None) -> Any:
    student = student or Pooled(1, told=False)
    teacher = Pooled(2)

    @torch.no_grad()
    def answers(batch, rows):
        return teacher(batch, rows)

    found = method.losses({"student": student, "teacher": answers}, batch, frozenset({"student"}), STEP)
    total = torch.stack([term.weight * term.sum.double() for term in found.terms.values()]).sum()
    return found, torch.autograd.grad(total, student.embed)[0]


def known(method: UniSD, scale: float = 1.0) -> UniSD:
    method.scale.value = torch.tensor(scale, dtype=torch.float64)
    return method


def test_with_all_off_it_is_sdft_exactly(tmp_path):
    off, plain = (weights(trainer(tmp_path, made, max_steps=3)) for made in (UniSD(), SelfDistillation([ForwardKL()])))
    assert all(torch.equal(off[name], plain[name]) for name in off)


@pytest.mark.parametrize("per", ["token", "sequence"])
@pytest.mark.parametrize("statistic", ["variance", "range"])
def test_contexts_that_are_alike_weigh_one_and_others_less(per, statistic):
    method = known(UniSD(agreement=Agreement(per=per, statistic=statistic)))
    batch = batch_of([LIKE, LIKE])
    _, plain = run(UniSD(), batch)
    alike, same = run(method, batch)
    assert torch.equal(same, plain)
    assert alike.metrics["agreement"][0] == len(kept_rows(batch["labels"]))
    mixed, _ = run(method, batch_of([LIKE, UNLIKE]))
    assert mixed.metrics["agreement"][0] < alike.metrics["agreement"][0]


def test_weights_of_a_whole_sequence_do_not_cancel():
    """Divided by the sum of weights in each sequence they would; the gradient has to scale with them."""
    batch = batch_of([UNLIKE])
    _, plain = run(UniSD(), batch)
    for strength in (0.5, 5.0):
        found, gradient = run(UniSD(agreement=Agreement(per="sequence", strength=strength)), batch)
        rows = len(kept_rows(batch["labels"]))
        weight = found.metrics["agreement"][0] / rows
        assert 0 < weight < 0.999
        torch.testing.assert_close(gradient, weight * plain)


def test_weights_are_the_papers():
    logs = torch.tensor([[-1.0, -2.0, -1.0], [-1.0, -4.0, -9.0], [-1.0, -3.0, -5.0]], dtype=torch.float64)
    sequence = torch.tensor([0, 0, 1])
    scale = Quantile(0.95)
    scale.value = torch.tensor(0.5, dtype=torch.float64)
    of_range = Agreement(statistic="range", strength=2.0)
    apart = disagreement(logs, of_range, sequence)
    assert apart.tolist() == [0.0, 2.0, 8.0]
    expected = [1.0, 1 / (1 + 2 * 4), 1 / (1 + 2 * 10)]  # 16 quantiles count as 10
    torch.testing.assert_close(agreement_weights(apart, of_range, scale), torch.tensor(expected, dtype=torch.float64))
    assert (agreement_weights(apart, of_range, Quantile(0.95)) == 1).all()
    assert agreement_weights(apart, Agreement(statistic="range", strength=1e4), scale)[-1] == 0.01
    assert disagreement(logs, Agreement(), sequence).tolist() == [0.0, 1.0, 16.0]
    means = disagreement(logs, Agreement(per="sequence", statistic="range", strength=0.1), sequence)
    assert means.tolist() == [1.0, 1.0, 8.0]
    variance = disagreement(logs, Agreement(per="sequence"), sequence)
    torch.testing.assert_close(variance, torch.tensor([1 / 6, 1 / 6, 32 / 3], dtype=torch.float64))


def test_one_context_cannot_disagree():
    with pytest.raises(ValueError, match="expected at least 2"):
        run(UniSD(agreement=Agreement()), batch_of([["a"]]))
    with pytest.raises(ValueError, match="of them in rows of one batch"):
        batch_of([["a"], ["a", "b"]])


def test_the_contrast_is_the_formula_of_the_texts_tokens_and_of_rows_that_have_a_bad_context():
    batch = batch_of([[], []], bad=["zebra", ""])
    student, teacher, rows = Pooled(1, told=False), Pooled(2), kept_rows(batch["labels"])
    found, _ = run(UniSD(contrast=Contrast(weight=0.3, margin=0.5)), batch, student)
    q, good, bad = (
        model(one, rows).head.logits(model(one, rows).hidden).log_softmax(-1).gather(-1, rows.labels[:, None])[:, 0]
        for model, one in (
            (student, batch),
            (teacher, batch),
            (teacher, batch | {"theirs": batch["misled"]}),
        )
    )
    per_token = torch.relu(0.5 + (q - good).abs() - (q - bad).abs())
    assert found.terms["contrast"].weight == 0.3
    torch.testing.assert_close(found.terms["contrast"].sum, per_token[:3].sum())  # the first row has three tokens
    without, _ = run(UniSD(contrast=Contrast()), batch_of([[], []]))
    assert without.terms["contrast"].sum == 0


@pytest.mark.parametrize("good", ["ok", ""])
def test_the_teacher_is_asked_as_often_where_no_row_has_a_bad_context(good):
    """Else a teacher whose weights are sharded would wait for a rank that has none."""
    asked = []
    for bad in (["no", "no"], ["", ""]):
        teacher = Pooled(2)
        calls = []
        views = {"student": Pooled(1), "teacher": lambda *given, one=teacher, seen=calls: seen.append(1) or one(*given)}
        method = UniSD(contrast=Contrast())
        method.losses(views, batch_of([[], []], bad, good), frozenset({"student"}), STEP)
        asked.append(len(calls))
    assert asked == [2, 2]


def test_a_bad_context_that_is_the_good_one_leaves_the_margin_and_no_gradient():
    batch = batch_of([[], []], bad=["ok", "ok"])
    found, gradient = run(UniSD(contrast=Contrast(margin=0.5)), batch)
    assert found.terms["contrast"].sum.item() == pytest.approx(0.5 * len(kept_rows(batch["labels"])))
    torch.testing.assert_close(gradient, run(UniSD(), batch)[1])


def test_the_contrast_has_its_derivative():
    """Away from its kinks, in float64."""
    batch, student = batch_of([[], []], bad=["zebra", "quiz"]), Pooled(1, told=False)
    method = UniSD(contrast=Contrast(weight=1.0, margin=5.0))

    def loss(embed):
        model = Pooled(1, told=False)
        model.embed = embed
        teacher = Pooled(2)
        with torch.no_grad():
            signal = teacher(batch, kept_rows(batch["labels"]))
        rows = kept_rows(batch["labels"])
        return method._contrast({"teacher": teacher}, model(batch, rows), signal, batch, rows)

    few = student.embed.detach()[:VOCAB].clone().requires_grad_()
    (found,) = torch.autograd.grad(loss(few), few)
    draw = torch.Generator().manual_seed(0)
    for _ in range(5):
        way = torch.randn(few.shape, generator=draw, dtype=torch.float64)
        ahead, back = (loss((few + step * way).detach()) for step in (1e-6, -1e-6))
        assert (found * way).sum().item() == pytest.approx(((ahead - back) / 2e-6).item(), rel=1e-5, abs=1e-7)


def test_features_are_the_mean_square_of_last_hidden_states_and_logits_have_none():
    batch, student = batch_of([[], []]), Pooled(1, told=False)
    found, _ = run(UniSD(features=0.1), batch, student)
    rows = kept_rows(batch["labels"])
    assert found.terms["features"].weight == 0.1
    expected = (student(batch, rows).hidden - Pooled(2)(batch, rows).hidden).square().mean(-1).sum()
    torch.testing.assert_close(found.terms["features"].sum, expected.float(), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="gives logits alone"):
        nets = {"student": lambda b, r: Dense(torch.zeros(len(r), VOCAB)), "teacher": Pooled(2)}
        UniSD(features=0.1).losses(nets, batch, frozenset(), STEP)


def test_infinite_and_unknown_clips_are_none_and_a_known_quantile_clips():
    batch = batch_of([[], []])
    _, plain = run(UniSD(), batch)
    assert torch.equal(run(UniSD(clip=math.inf), batch)[1], plain)
    method = UniSD(clip_quantile=0.5)
    found, gradient = run(method, batch)
    assert torch.equal(gradient, plain) and found.metrics["clipped"][0] == 0
    assert method.limit is not None
    method.limit.value = torch.tensor(1e-9, dtype=torch.float64)
    found, gradient = run(method, batch)
    assert not gradient.any() and found.metrics["clipped"][0] == len(kept_rows(batch["labels"]))


@pytest.mark.parametrize("share", [0.5, 0.95])
def test_a_followed_quantile_comes_to_the_quantile_whatever_it_begins_with(share):
    draw = torch.Generator().manual_seed(2)
    quantile, seen = Quantile(share), []
    for _ in range(600):
        numbers = torch.randn(400, generator=draw, dtype=torch.float64).square() * 3
        above = (numbers > quantile.value).double().mean()
        quantile.follow(numbers.mean(), above)
        seen.append(quantile.value.item())
    truth = (torch.randn(200_000, generator=draw, dtype=torch.float64).square() * 3).quantile(share).item()
    assert sum(seen[-200:]) / 200 == pytest.approx(truth, rel=0.1)
    assert not Quantile(share).known


def test_two_clips_are_refused():
    with pytest.raises(ValidationError, match="keep one"):
        UniSDSection(clip=1.0, clip_quantile=0.9)


SWITCHES: dict[str, dict[str, Any]] = {
    "token": {"agreement": Agreement()},
    "sequence": {"agreement": Agreement(per="sequence", statistic="range")},
    "contrast": {"contrast": Contrast()},
    "features": {"features": 0.1},
    "clip": {"clip": 0.05},
    "clip_quantile": {"clip_quantile": 0.9},
}


@pytest.mark.parametrize("switch", SWITCHES)
def test_each_component_trains_by_itself(tmp_path, switch):
    made = trainer(tmp_path, UniSD(**SWITCHES[switch]), columns=told, max_steps=8, learning_rate=3e-3)
    weights(made)
    losses = [line["loss"] for line in made.state.log_history if "loss" in line]
    assert all(math.isfinite(loss) for loss in losses) and min(losses[4:]) < losses[0]


def test_a_killed_unisd_run_ends_as_an_unbroken_one(tmp_path):
    everything = {"agreement": Agreement(), "contrast": Contrast(), "features": 0.1, "clip_quantile": 0.9}
    saves = {"save_strategy": "steps", "save_steps": 2, "columns": told}
    whole = weights(trainer(tmp_path / "a", UniSD(**everything), **saves))
    trainer(tmp_path / "b", UniSD(**everything), **saves).train()
    made = trainer(tmp_path / "b", UniSD(**everything), **saves)
    made.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-4"))
    assert all(torch.equal(p.detach(), whole[name]) for name, p in made.student.named_parameters())


def test_the_split_into_micro_batches_does_not_show(tmp_path):
    everything = {"agreement": Agreement(), "contrast": Contrast(), "features": 0.1, "clip_quantile": 0.9}
    plain = {"optim": "sgd", "learning_rate": 0.5, "max_steps": 3, "columns": told, "reward": None}
    whole = weights(trainer(tmp_path, UniSD(student_share=0.0, **everything), **plain, data=True))
    cut = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}
    other = weights(trainer(tmp_path, UniSD(student_share=0.0, **everything), **plain, **cut, data=True))
    for name in whole:
        torch.testing.assert_close(other[name], whole[name], rtol=1e-7, atol=1e-9)


def test_told_nothing_with_the_current_weights_no_component_moves_anything(tmp_path):
    from kdlm.teachers import SelfTeacher

    method = UniSD(agreement=Agreement(), features=0.1, clip_quantile=0.9)
    empty = lambda number: {"contexts": ["", "", ""], "context": ""}  # noqa: E731
    made = trainer(tmp_path, method, SelfTeacher("current"), columns=empty, max_steps=2, optim="sgd")
    before = {name: p.detach().clone() for name, p in made.student.named_parameters()}
    assert all(torch.equal(value, before[name]) for name, value in weights(made).items())
