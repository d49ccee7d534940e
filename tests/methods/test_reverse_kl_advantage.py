"""Reverse KL as advantage: exact in mean, on text of today's student, of an older one, and of another temperature."""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from tabular import (
    COMPLETIONS,
    END,
    PREFIXES,
    VOCAB,
    Table,
    batch_of,
    draw_table,
    gradient,
    gradient_on_states,
    mean_gradient,
    run,
)

from kdlm.losses import CrossEntropy, ForwardKL, reverse_kl
from kdlm.methods import ReverseKLAdvantage, Step
from kdlm.signal import Dense, Head, Hidden, LogProbs, Mixture, TopK


def as_log_probs(logits, labels):
    return LogProbs(logits.detach().log_softmax(-1).gather(-1, labels[:, None]).squeeze(-1))


def as_hidden(logits, labels):
    return Hidden(logits, Head(torch.eye(VOCAB, dtype=torch.float64)))


def as_mixture(logits, labels):
    return Mixture((Dense(logits.detach()),) * 2, torch.full((len(logits), 2), 0.5, dtype=torch.float64).log())


@pytest.mark.parametrize("answer", [as_log_probs, as_hidden, as_mixture])
def test_its_mean_gradient_is_that_of_reverse_kl_at_every_state_whatever_tells_the_teachers_mind(answer):
    student, teacher = draw_table(1), draw_table(2)
    found = mean_gradient(ReverseKLAdvantage(), student, Table(teacher.logits, answer), student)
    torch.testing.assert_close(found, gradient_on_states(reverse_kl, student, teacher, student))
    assert found.abs().max() > 1e-2


@pytest.mark.parametrize("kind", ["older", "hotter"])
def test_with_importance_weights_it_is_that_of_the_present_student_on_text_of_another(kind):
    student, teacher = draw_table(1), draw_table(2)
    writer = draw_table(3) if kind == "older" else Table(student.logits.detach() / 1.7)
    exact = gradient_on_states(reverse_kl, student, teacher, writer)
    weighed = mean_gradient(ReverseKLAdvantage(importance_cap=torch.inf), student, teacher, writer)
    torch.testing.assert_close(weighed, exact)
    for cap in (None, 1.05):  # without weights, and with weights that are cut, there is a bias
        biased = mean_gradient(ReverseKLAdvantage(importance_cap=cap), student, teacher, writer)
        assert (biased - exact).abs().max() > 1e-3


def test_a_student_that_is_its_teacher_gets_no_gradient_at_all():
    student = draw_table(1)
    terms = run(ReverseKLAdvantage(), student, Table(student.logits.detach()), batch_of(COMPLETIONS, student))
    assert gradient(terms, student).abs().max() < 1e-14
    assert terms.metrics["reverse_kl"][0].abs() < 1e-12


def test_the_metrics_are_estimates_of_reverse_kl_and_say_how_far_the_writer_is():
    student, teacher, writer = draw_table(1), draw_table(2), draw_table(3)
    names = ("reverse_kl", "reverse_kl_k3", "log_weight", "student_entropy")
    means, exact = dict.fromkeys(names, 0.0), 0.0
    for text in COMPLETIONS:
        weight = writer.probability(text).item()
        batch = batch_of([text], writer)
        metrics = run(ReverseKLAdvantage(importance_cap=torch.inf), student, teacher, batch).metrics
        assert {metrics[name][1] for name in names} == {"sampled"}
        means = {name: means[name] + weight * metrics[name][0].item() for name in names}
        states = [PREFIXES[text[:i]] for i in range(len(text))]
        exact += weight * reverse_kl(student.logits[states], teacher.logits[states]).sum().item()
    assert means["reverse_kl"] == pytest.approx(exact) and means["reverse_kl_k3"] == pytest.approx(exact)
    assert means["log_weight"] > 0.1 and means["student_entropy"] > 0.1
    own = run(ReverseKLAdvantage(), student, teacher, batch_of(COMPLETIONS, student))
    assert own.metrics["log_weight"][0] < 1e-12 and own.metrics["weights_cut"][0] == 0
    torch.testing.assert_close(own.terms["policy"].sum.detach(), own.metrics["reverse_kl"][0])  # the loss says it too


def test_weights_are_cut_at_the_cap_and_the_cut_ones_counted():
    student, teacher, writer = draw_table(1), draw_table(2), draw_table(3)
    ratios = torch.cat([student.log_probs(text) - writer.log_probs(text) for text in COMPLETIONS]).exp()
    batch = batch_of(COMPLETIONS, writer)
    terms = run(ReverseKLAdvantage(importance_cap=1.5), student, teacher, batch)
    assert terms.metrics["weights_cut"][0] == (ratios > 1.5).sum() > 0
    loose = run(ReverseKLAdvantage(importance_cap=ratios.max().item() + 1), student, teacher, batch)
    exact = run(ReverseKLAdvantage(importance_cap=torch.inf), student, teacher, batch)
    assert torch.equal(gradient(loose, student), gradient(exact, student))
    assert not torch.equal(gradient(terms, student), gradient(exact, student))


@pytest.mark.filterwarnings("ignore")
def test_prefix_weighting_is_that_of_trls_iw_opd():
    from trl.experimental.iw_opd.iw_opd_trainer import IWOPDTrainer

    student, teacher = draw_table(1), draw_table(2)
    texts = [(1, 2, 3), (3, END), (2, 2, END), (END,)]
    method = ReverseKLAdvantage(prefix_weighting=0.5, importance_cap=None)
    ours = gradient(run(method, student, teacher, batch_of(texts, student, packed=True)), student)
    tokens = torch.tensor([[*text, *[0] * (3 - len(text))] for text in texts])
    labels = torch.tensor([[*text, *[-100] * (3 - len(text))] for text in texts])
    places = torch.tensor([[PREFIXES[text[: min(i, len(text) - 1)]] for i in range(3)] for text in texts])
    said = teacher.logits.detach().log_softmax(-1)[places].gather(-1, tokens[..., None]).squeeze(-1)
    trainer = SimpleNamespace(
        temperature=1.0,
        iw_opd_gamma=0.5,
        iw_opd_epsilon=1e-8,
        model=SimpleNamespace(training=True),
        _metrics={"train": defaultdict(list)},
    )
    theirs = IWOPDTrainer._compute_iw_opd_loss(
        trainer, student.logits[places], tokens, labels, said, num_items_in_batch=1
    )
    torch.testing.assert_close(ours, torch.autograd.grad(theirs, student.logits)[0])
    plain = run(ReverseKLAdvantage(importance_cap=None), student, teacher, batch_of(texts, student))
    assert not torch.allclose(ours, gradient(plain, student))


def test_a_token_that_the_teacher_does_not_know_is_pushed_down_by_a_bounded_step():
    student, teacher = draw_table(1), draw_table(2)
    terms = run(ReverseKLAdvantage(vocab=3), student, teacher, batch_of([(3, END)], student))
    found = gradient(terms, student)
    assert found.isfinite().all()
    assert found[PREFIXES[()], 3] > 0  # descent lowers its logit
    assert terms.metrics["reverse_kl"][0] == pytest.approx(50, abs=5)


def test_evaluation_gives_reverse_kl_on_given_text_or_with_token_scores_cross_entropy():
    student, teacher = draw_table(1), draw_table(2)
    given = {key: x for key, x in batch_of(COMPLETIONS[:7], student).items() if key not in ("sampled", "log_probs")}
    found = ReverseKLAdvantage().evaluate({"student": student, "teacher": teacher}, given, Step(0, 1))
    states = [PREFIXES[text[:i]] for text in COMPLETIONS[:7] for i in range(len(text))]
    exact = reverse_kl(student.logits[states], teacher.logits[states]).sum()
    torch.testing.assert_close(found.terms["token_loss"].sum, exact)
    assert {"reverse_kl", "kl_to_teacher", "top1_agreement", "student_entropy"} <= found.metrics.keys()
    scorer = Table(teacher.logits, as_log_probs)
    scored = ReverseKLAdvantage().evaluate({"student": student, "teacher": scorer}, given, Step(0, 1))
    exact = -torch.cat([student.log_probs(text) for text in COMPLETIONS[:7]]).sum()
    torch.testing.assert_close(scored.terms["token_loss"].sum, exact)


def test_what_it_cannot_learn_from_is_refused():
    student, teacher = draw_table(1), draw_table(2)
    batch = batch_of([(1, END)], student)
    del batch["sampled"]
    with pytest.raises(ValueError, match="own text, and the batch has none"):
        run(ReverseKLAdvantage(), student, teacher, batch)
    with pytest.raises(ValueError, match="takes cross_entropy only, on the data's own text, not forward_kl"):
        ReverseKLAdvantage([CrossEntropy(), ForwardKL()])
    few = Table(teacher.logits, lambda logits, labels: TopK(labels[:, None], logits[:, :1]))
    with pytest.raises(ValueError, match="got a TopK signal"):
        run(ReverseKLAdvantage(), student, few, batch_of([(1, END)], student))


def test_a_student_comes_to_its_teacher_from_its_own_samples():
    student, teacher = draw_table(1), draw_table(2)
    optimiser = torch.optim.Adam([student.logits], lr=0.05)
    method = ReverseKLAdvantage()

    def distance():
        ratios = [(student.log_probs(text) - teacher.log_probs(text)).sum() for text in COMPLETIONS]
        return sum(student.probability(text) * ratio for text, ratio in zip(COMPLETIONS, ratios, strict=True)).item()

    before = distance()
    for _ in range(60):
        chances = torch.stack([student.probability(text) for text in COMPLETIONS]).detach()
        texts = [COMPLETIONS[i] for i in torch.multinomial(chances, 64, replacement=True).tolist()]
        optimiser.zero_grad()
        run(method, student, teacher, batch_of(texts, student)).terms["policy"].sum.div(64).backward()
        optimiser.step()
    assert distance() < before / 5
