"""The policy gradient of rewards is the derivative of the expected reward; what a group and a turn are worth."""

import torch
from tabular import COMPLETIONS, batch_of, draw_table, gradient, mean_gradient, run

from kdlm.losses import ReverseKL
from kdlm.methods import RewardMethod
from kdlm.methods.rewards import group_means
from kdlm.methods.turns import discounted

NAN = float("nan")
REWARDS = torch.tensor([1.0, 5.0, 0.0, 7.0, 2.0, NAN, NAN], dtype=torch.float64)
GROUPS = torch.tensor([4, 9, 4, 9, 4, 9, 1])


def test_the_mean_of_a_group_is_that_of_what_is_known_of_it() -> None:
    assert group_means(REWARDS, GROUPS).tolist() == [1.0, 6.0, 1.0, 6.0, 1.0, 6.0, 0.0]


def test_a_turn_is_worth_its_reward_and_a_part_of_what_comes_after() -> None:
    rewards = torch.tensor([[1.0, 2.0, 4.0], [1.0, 2.0, NAN], [3.0, NAN, NAN]])
    worth = discounted(rewards, 0.5)
    assert worth.nan_to_num(-1).tolist() == [[3.0, 4.0, 4.0], [2.0, 2.0, -1.0], [3.0, -1.0, -1.0]]
    assert torch.equal(discounted(rewards, 0.0).nan_to_num(), rewards.nan_to_num())


class Scored(RewardMethod):
    """Pushes completions by what they are worth, without a group: the enumeration has one at a time."""

    def advantages(self, batch):
        return torch.tensor([worth(ids) for ids in batch["input_ids"].tolist()], dtype=torch.float64)


def worth(text) -> float:
    return 1.5 - list(text).count(2)


def test_the_gradient_is_that_of_the_expected_reward() -> None:
    student, other = draw_table(1), draw_table(2)
    found = mean_gradient(Scored(), student, other, student)
    expected = torch.stack([student.probability(text) * worth(text) for text in COMPLETIONS]).sum()
    torch.testing.assert_close(found, -torch.autograd.grad(expected, student.logits)[0])


def test_older_text_is_weighed_by_the_students_ratio_up_to_the_cap() -> None:
    student, writer = draw_table(1), draw_table(3)
    batch = batch_of(COMPLETIONS, writer)
    by_hand = torch.zeros((), dtype=torch.float64)
    for text in COMPLETIONS:
        logs = student.log_probs(text)
        weights = (logs - writer.log_probs(text)).detach().exp().clamp(max=1.5)
        by_hand = by_hand - (weights * worth(text) * logs).sum()
    terms = run(Scored(importance_cap=1.5), student, writer, batch)
    torch.testing.assert_close(gradient(terms, student), torch.autograd.grad(by_hand, student.logits)[0])
    assert terms.metrics["weights_cut"][0] > 0
    free = run(Scored(importance_cap=None), student, writer, batch)
    assert "weights_cut" not in free.metrics


def test_losses_beside_it_are_means_over_the_same_tokens_and_need_a_teacher() -> None:
    student, teacher = draw_table(1), draw_table(2)
    batch = batch_of(COMPLETIONS[:6], student)
    both = run(Scored([ReverseKL(weight=0.5)]), student, teacher, batch)
    assert {term.unit for term in both.terms.values()} == {"sampled"} and "reverse_kl" in both.metrics
    assert "teacher" in Scored([ReverseKL()]).needs and "teacher" not in Scored().needs
