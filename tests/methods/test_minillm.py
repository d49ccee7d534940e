"""MiniLLM: the gradient of sequence reverse KL, by enumeration of all that a small model can write."""

from functools import partial

import pytest
import torch
from tabular import (
    COMPLETIONS,
    END,
    PREFIXES,
    Table,
    batch_of,
    draw_table,
    gradient,
    gradient_on_states,
    mean_gradient,
    mixed,
    run,
)

from kdlm.losses import reverse_kl
from kdlm.methods import MiniLLM
from kdlm.signal import Dense, LogProbs

WHOLE = partial(MiniLLM, length_normalisation=False)


def sequence_reverse_kl(student, teacher):
    """KL(q || p) over completions, in the student's graph."""
    ratios = [(student.log_probs(text) - teacher.log_probs(text)).sum() for text in COMPLETIONS]
    return sum(student.probability(text) * ratio for text, ratio in zip(COMPLETIONS, ratios, strict=True))


@pytest.mark.parametrize("single_step", [True, False])
def test_its_mean_gradient_is_that_of_the_reverse_kl_of_whole_sequences(single_step):
    student, teacher = draw_table(1), draw_table(2)
    found = mean_gradient(WHOLE(single_step=single_step), student, teacher, student)
    (exact,) = torch.autograd.grad(sequence_reverse_kl(student, teacher), student.logits)
    torch.testing.assert_close(found, exact)
    assert (found - gradient_on_states(reverse_kl, student, teacher, student)).abs().max() > 1e-2


def test_the_single_step_has_less_variance():
    student, teacher = draw_table(1), draw_table(2)
    spread = {}
    for single_step in (True, False):
        method, mean, square = WHOLE(single_step=single_step), 0.0, 0.0
        for text in COMPLETIONS:
            weight = student.probability(text).detach()
            found = gradient(run(method, student, teacher, batch_of([text], student)), student)
            mean, square = mean + weight * found, square + weight * found.square().sum()
        spread[single_step] = square - mean.square().sum()
    assert spread[True] < spread[False]


@pytest.mark.parametrize("length_normalisation", [True, False])
def test_discount_0_with_the_single_step_is_reverse_kl_over_the_vocabulary_on_rollouts(length_normalisation):
    student, teacher = draw_table(1), draw_table(2)
    texts = [(1, 2, 3), (3, END), (END,)]
    method = MiniLLM(discount=0.0, length_normalisation=length_normalisation)
    terms = run(method, student, teacher, batch_of(texts, student))
    states = [PREFIXES[text[:i]] for text in texts for i in range(len(text))]
    exact = reverse_kl(student.logits[states], teacher.logits[states]).sum()
    torch.testing.assert_close(terms.terms["single_step"].sum, exact, rtol=1e-14, atol=0)
    assert terms.terms["policy"].sum == 0
    torch.testing.assert_close(
        gradient(terms, student), torch.autograd.grad(exact, student.logits)[0], rtol=1e-12, atol=1e-15
    )


def test_rewards_are_summed_with_powers_of_the_distance_and_divided_by_the_powers():
    """TRL 1.x takes gamma^j for gamma^(j - i), which only the division hides."""
    rewards = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0], dtype=torch.float64)
    sequence = torch.tensor([0, 0, 0, 1, 1])
    sums = torch.tensor([1 + 0.5 * 2 + 0.25 * 4, 2 + 0.5 * 4, 4, 8 + 0.5 * 16, 16], dtype=torch.float64)
    powers = torch.tensor([1.75, 1.5, 1.0, 1.5, 1.0], dtype=torch.float64)
    for single_step, expected in ((False, sums), (True, sums - rewards)):
        plain = WHOLE(discount=0.5, single_step=single_step).advantages(rewards, sequence)
        torch.testing.assert_close(plain, expected)
        normalised = MiniLLM(discount=0.5, single_step=single_step).advantages(rewards, sequence)
        torch.testing.assert_close(normalised, expected / powers)


def test_without_a_teacher_in_the_mixture_the_importance_weights_are_1():
    student, teacher = draw_table(1), draw_table(2)
    batch = batch_of(COMPLETIONS, mixed(teacher, student, 0.0))
    weighed, plain = (run(MiniLLM(importance_cap=cap), student, teacher, batch) for cap in (torch.inf, None))
    assert weighed.metrics["log_weight"][0] < 1e-12
    torch.testing.assert_close(gradient(weighed, student), gradient(plain, student))


def test_text_of_a_mixture_with_the_teacher_is_weighed_back_to_the_student_token_by_token():
    student, teacher = draw_table(1), draw_table(2)
    writer = mixed(teacher, student, 0.2)
    method = MiniLLM(discount=0.0, single_step=False)  # a weight is at most 1 / (1 - 0.2): the cap of 2 cuts none
    found = mean_gradient(method, student, teacher, writer)
    torch.testing.assert_close(found, gradient_on_states(reverse_kl, student, teacher, writer))
    assert run(method, student, teacher, batch_of(COMPLETIONS, writer)).metrics["weights_cut"][0] == 0
    unweighed = mean_gradient(MiniLLM(discount=0.0, single_step=False, importance_cap=None), student, teacher, writer)
    assert (found - unweighed).abs().max() > 1e-3


def test_a_teacher_that_scores_tokens_only_does_without_the_single_step():
    student, teacher = draw_table(1), draw_table(2)
    batch = batch_of(COMPLETIONS, student)
    scorer = Table(
        teacher.logits, lambda z, labels: LogProbs(z.detach().log_softmax(-1).gather(-1, labels[:, None]).squeeze(-1))
    )
    whole, scored = (run(MiniLLM(single_step=False), student, who, batch) for who in (teacher, scorer))
    torch.testing.assert_close(gradient(scored, student), gradient(whole, student))
    with pytest.raises(ValueError, match="scores sampled tokens only; set false"):
        run(MiniLLM(), student, scorer, batch)
    assert LogProbs in MiniLLM(single_step=False).signals and LogProbs not in MiniLLM().signals
    assert Dense in MiniLLM().signals
