"""SDPO: who is told what, that those who are told nothing count for nothing, and the loss beside TRL's."""

import math
import warnings
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from self_attempts import trainer, weights

from kdlm.losses import JSD, ForwardKL, ReverseKL, told_of_likeliest
from kdlm.methods import SDPO, SDPOSection, Step
from kdlm.rollouts import Completion, Written
from kdlm.signal import IGNORE_INDEX, Dense, Head, Hidden

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # TRL says of each of its experimental modules that it is one
    from trl.experimental.sdpo import loss_utils as trl

STEP = Step(0, 10)
VOCAB, LENGTH = 11, 6


def attempts(rewards: list[float | None], size: int = 3) -> list[Written]:
    """Groups of `size` attempts at a prompt, with these rewards and named a, b, c ..."""
    return [
        Written({"index": n // size}, [1], Completion([2], [0.0], "end", n // size), "abcdefghi"[n], reward)
        for n, reward in enumerate(rewards)
    ]


def method(losses=(), **options: Any) -> SDPO:
    return SDPO(losses, **{"peer_template": "P{peer}", "feedback_template": "F{feedback}", **options})


def test_the_teacher_is_told_the_first_other_attempt_that_succeeded():
    written = attempts([0.0, 1.0, 1.0, 1.0, 0.0, None, 0.9, 0.0, 0.0])
    assert method().told(written) == ["Pb", "Pc", "Pb", "", "Pd", "Pd", "", "", ""]
    assert method(success=0.9).told(written)[6:] == ["", "Pg", "Pg"]
    assert method(peers=False).told(written) == [""] * 9


@pytest.mark.parametrize(
    ("feedback", "expected"), [("never", ["", "Pa"]), ("always", ["Fno", "PaFno"]), ("without_peer", ["Fno", "Pa"])]
)
def test_what_the_verifier_says_is_told_as_asked(feedback, expected):
    written = attempts([1.0, 0.0], size=2)
    for one in written:
        one.__dict__["feedback"] = "no"
    assert method(feedback=feedback).told(written) == expected


def test_braces_in_an_attempt_are_text():
    written = attempts([1.0, 0.0], size=2)
    written[0].__dict__["text"] = "{peer} {context} {feedback}"
    assert method().told(written)[1] == "P{peer} {context} {feedback}"


class Fixed:
    """Answers with rows of its own, one for each place of a batch; through a head where `width` is given."""

    def __init__(self, seed: int, count: int, width: int | None = None):
        draw = torch.Generator().manual_seed(seed)
        self.logits = torch.randn(count * LENGTH, VOCAB, generator=draw, dtype=torch.float64).requires_grad_()
        self.turn = None if width is None else torch.linalg.qr(torch.randn(VOCAB, VOCAB, dtype=torch.float64))[0]

    def __call__(self, batch, rows):
        said = self.logits[batch["place"].flatten()[rows.index]]
        return Dense(said) if self.turn is None else Hidden(said @ self.turn, Head(self.turn))


def batch_of(informed: list[bool], which: list[int] | None = None) -> dict[str, torch.Tensor]:
    """Attempts of `LENGTH` tokens, two at a prompt, of which the first two tokens are the prompt."""
    which = list(range(len(informed))) if which is None else which
    draw = torch.Generator().manual_seed(9)
    ids = torch.randint(0, VOCAB, (len(informed), LENGTH), generator=draw)[which]
    logs = -torch.rand(len(informed), LENGTH, generator=draw, dtype=torch.float64)[which] * 4
    labels = torch.where(torch.arange(LENGTH) >= 2, ids, IGNORE_INDEX)
    return {
        "input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids), "log_probs": logs,
        "sampled": labels != IGNORE_INDEX, "informed": torch.tensor(informed)[which], "index": torch.tensor(which) // 2,
        "place": (torch.tensor(which)[:, None] * LENGTH + torch.arange(LENGTH)),
    }  # fmt: skip


def run(made: SDPO, nets: dict[str, Any], batch: dict[str, torch.Tensor]):
    return made.losses(nets, batch, frozenset({"student"}), STEP)


def gradient(terms, student: Fixed) -> torch.Tensor:
    return torch.autograd.grad(terms.terms["token_loss"].sum, student.logits)[0]


FORMS: dict[str, dict[str, Any]] = {
    "drawn": {},
    "whole": {"losses": [JSD()]},
    "top_k": {"losses": [JSD()], "top_k": 4},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("width", [None, 1])
def test_attempts_without_a_context_count_for_nothing(form, width):
    student, teacher = Fixed(1, 4, width), Fixed(2, 4)
    nets = {"student": student, "teacher": teacher}
    batch = batch_of([True, False, True, False])
    terms = run(method(**FORMS[form]), nets, batch)
    only = run(method(**FORMS[form]), nets, batch_of([True, False, True, False], [0, 2]))
    torch.testing.assert_close(terms.terms["token_loss"].sum, only.terms["token_loss"].sum)
    found = gradient(terms, student).view(4, LENGTH, VOCAB)
    torch.testing.assert_close(found.view(-1, VOCAB), gradient(only, student))
    assert not found[1].any() and not found[3].any() and found[0].any() and found[2].any()
    counts = method().counts(batch)
    assert {name: int(value) for name, value in counts.items()} == {
        "tokens": 16,
        "told": 8,
        "sequences": 4,
        "groups": 2,
    }
    assert terms.terms["token_loss"].unit == "told" and {unit for _, unit in terms.metrics.values()} <= counts.keys()


@pytest.mark.parametrize("form", FORMS)
def test_groups_without_a_success_are_counted_and_teach_exactly_nothing(form):
    student, teacher = Fixed(1, 6), Fixed(2, 6)
    nets = {"student": student, "teacher": teacher}
    some = run(method(**FORMS[form]), nets, batch_of([True, False, False, False, True, True]))
    assert some.metrics["untold_groups"][0] == 1 and some.metrics["informed"][0] == 3
    none = run(method(**FORMS[form]), nets, batch_of([False] * 6))
    assert none.terms["token_loss"].sum == 0 and not gradient(none, student).any()
    assert none.terms.keys() == some.terms.keys() and none.metrics.keys() == some.metrics.keys()
    assert method().counts(batch_of([False] * 6))["told"] == 0


@pytest.mark.parametrize("form", FORMS)
def test_the_split_into_micro_batches_does_not_show(form):
    student, teacher = Fixed(1, 6), Fixed(2, 6)
    nets, informed = {"student": student, "teacher": teacher}, [True, True, False, True, False, False]
    whole = run(method(**FORMS[form]), nets, batch_of(informed))
    pieces = [run(method(**FORMS[form]), nets, batch_of(informed, [at, at + 1])) for at in (0, 2, 4)]
    torch.testing.assert_close(sum(gradient(one, student) for one in pieces), gradient(whole, student))
    for name, (value, _) in whole.metrics.items():
        torch.testing.assert_close(sum(piece.metrics[name][0] for piece in pieces), value)


@pytest.mark.parametrize("form", FORMS)
def test_a_teacher_that_is_the_student_teaches_nothing(form):
    student = Fixed(1, 4)
    teacher = Fixed(1, 4)
    terms = run(method(**FORMS[form]), {"student": student, "teacher": teacher}, batch_of([True] * 4))
    assert terms.terms["token_loss"].sum.abs() < 1e-12 and gradient(terms, student).abs().max() < 1e-12


# Beside TRL, on equal logits and for the sum over tokens: TRL means over each attempt first, and over all attempts.


def trl_gradient(per_token, student: torch.Tensor, ids: torch.Tensor, logs: torch.Tensor, cap: float | None):
    if cap is not None:
        log_q = student.log_softmax(-1).gather(-1, ids[:, None])[:, 0]
        per_token = trl.apply_importance_sampling_clipping(per_token, log_q, logs, cap)
    return per_token.sum(), torch.autograd.grad(per_token.sum(), student)[0]


@pytest.mark.parametrize("cap", [None, 2.0, 0.5])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("top_k", [None, 3, VOCAB])
def test_divergences_are_trls(cap, alpha, top_k):
    batch, student, teacher = batch_of([True] * 4), Fixed(1, 4), Fixed(2, 4)
    ours = run(
        method([JSD(beta=alpha)], top_k=top_k, importance_cap=cap), {"student": student, "teacher": teacher}, batch
    )
    at = batch["place"][:, 1:-1].flatten()
    z, y = (net.logits.detach()[at].clone().requires_grad_() for net in (student, teacher))
    if top_k is None:
        per_token = trl.compute_full_logit_self_distillation_loss(z, y.detach(), distillation_alpha=alpha)
    else:
        per_token = trl.compute_topk_self_distillation_loss(
            z, y.detach(), distillation_topk=top_k, distillation_alpha=alpha, distillation_add_tail=True
        )
    value, theirs = trl_gradient(
        per_token, z, batch["labels"][:, 2:].flatten(), batch["log_probs"][:, 2:].flatten(), cap
    )
    tolerance = 1e-6 if top_k == VOCAB else 1e-9  # TRL's tail of nothing is 1e-7
    torch.testing.assert_close(ours.terms["token_loss"].sum, value, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(gradient(ours, student)[at], theirs, rtol=tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("cap", [None, 2.0])
def test_drawn_tokens_have_trls_gradient_and_reverse_kl_as_their_value(cap):
    """TRL's value is the log-ratio times log q, which stands for nothing; its gradient is ours."""
    batch, student, teacher = batch_of([True] * 4), Fixed(1, 4), Fixed(2, 4)
    ours = run(method(importance_cap=cap), {"student": student, "teacher": teacher}, batch)
    at, ids = batch["place"][:, 1:-1].flatten(), batch["labels"][:, 2:].flatten()
    z, y = (net.logits.detach()[at].clone().requires_grad_() for net in (student, teacher))
    per_token = trl.compute_sampled_token_self_distillation_loss(z, y.detach(), ids, distillation_alpha=1.0)
    _, theirs = trl_gradient(per_token, z, ids, batch["log_probs"][:, 2:].flatten(), cap)
    torch.testing.assert_close(gradient(ours, student)[at], theirs)
    assert ours.terms["token_loss"].sum == ours.metrics["reverse_kl"][0]


def test_the_support_is_the_students_and_its_bucket_is_below_the_whole_divergence():
    student, teacher = Fixed(1, 2), Fixed(2, 2)
    signal = told_of_likeliest(Dense(student.logits), Dense(teacher.logits), 3)
    assert torch.equal(signal.ids, student.logits.topk(3).indices)
    torch.testing.assert_close(
        signal.log_probs, teacher.logits.log_softmax(-1).gather(-1, signal.ids), check_dtype=False
    )
    whole, few = (ReverseKL()(student.logits, one) for one in (teacher.logits, signal))
    assert (few <= whole + 1e-12).all() and (few > 0).all()
    padded = told_of_likeliest(Dense(student.logits), Dense(teacher.logits[:, :6]), VOCAB)
    assert (padded.log_probs.isinf() == (padded.ids >= 6)).all()


def test_options_that_do_nothing_are_refused():
    with pytest.raises(ValidationError, match="told nothing"):
        SDPOSection(peers=False, feedback="never")
    with pytest.raises(ValidationError, match="stands 0 times"):
        SDPOSection(peer_template="a peer")
    with pytest.raises(ValueError, match="top_k: drawn tokens"):
        SDPOSection(top_k=5).build([], None)


# In a trainer


def test_without_a_success_nothing_moves(tmp_path):
    made = trainer(tmp_path, SDPO([JSD()]), reward=lambda texts, rows: [0.0] * len(texts), samples=3, max_steps=2)
    before = {name: p.detach().clone() for name, p in made.student.named_parameters()}
    assert all(torch.equal(value, before[name]) for name, value in weights(made).items())
    assert made.state.log_history[0]["loss"] == 0.0 and made.state.log_history[0]["untold_groups"] == 1.0


@pytest.mark.parametrize("losses", [[], [ForwardKL()]])
def test_a_killed_sdpo_run_ends_as_an_unbroken_one(tmp_path, losses):
    saves = {"save_strategy": "steps", "save_steps": 2, "samples": 3}
    whole = weights(trainer(tmp_path / "a", SDPO(losses), **saves))
    trainer(tmp_path / "b", SDPO(losses), **saves).train()
    made = trainer(tmp_path / "b", SDPO(losses), **saves)
    made.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-4"))
    assert all(torch.equal(p.detach(), whole[name]) for name, p in made.student.named_parameters())
    told = [line["informed"] for line in made.state.log_history if "informed" in line]
    assert any(0 < share for share in told) and math.isfinite(made.state.log_history[0]["loss"])
