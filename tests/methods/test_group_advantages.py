"""Advantages in groups: who is compared with whom, and that equal rewards teach nothing, whatever rounding says."""

import pytest
import torch

from kdlm.methods.rewards import RewardMethod, group_advantages

GROUP = torch.tensor([7, 7, 7, 3, 3, 5])


@pytest.mark.parametrize("leave_one_out", [False, True])
@pytest.mark.parametrize("reward", [0.1, 0.7, 1 / 3, -1.1, 1e4])
@pytest.mark.parametrize("size", [3, 6, 7, 16])
def test_equal_rewards_have_no_advantage_when_it_is_scaled(leave_one_out, reward, size):
    equal = torch.full((size,), reward)
    given = group_advantages(equal, torch.zeros(size, dtype=torch.long), leave_one_out=leave_one_out, scaled=True)
    assert given.tolist() == [0.0] * size


def test_an_advantage_is_the_gap_to_the_mean_of_the_known_of_the_group():
    rewards = torch.tensor([1.0, 0.0, torch.nan, 2.0, 6.0, 9.0])
    assert group_advantages(rewards, GROUP).tolist() == [0.5, -0.5, 0.0, -2.0, 2.0, 0.0]
    assert group_advantages(rewards, GROUP, leave_one_out=True).tolist() == [1.0, -1.0, 0.0, -4.0, 4.0, 0.0]
    scaled = group_advantages(rewards, GROUP, scaled=True)
    half = 0.5**0.5
    torch.testing.assert_close(scaled, torch.tensor([half, -half, 0.0, -half, half, 0.0]))


@pytest.mark.parametrize("scaled", [False, True])
def test_rewards_that_are_all_missing_give_no_advantage(scaled):
    assert group_advantages(torch.full((6,), torch.nan), GROUP, scaled=scaled).tolist() == [0.0] * 6


def test_a_small_spread_around_a_large_mean_is_a_spread():
    given = group_advantages(torch.tensor([100.0, 100.1]), torch.zeros(2, dtype=torch.long), scaled=True)
    torch.testing.assert_close(given, torch.tensor([-(0.5**0.5), 0.5**0.5]), rtol=1e-3, atol=0)


def test_rows_without_a_number_cannot_be_grouped_and_say_so():
    with pytest.raises(ValueError, match="compared by `index`, and the rows have none"):
        RewardMethod().advantages({"reward": torch.ones(2)})
