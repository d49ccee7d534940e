"""Turns: episodes whose turns are rewarded one by one, what an environment said in them, and turns read alone."""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor

from kdlm.methods.method import Batch
from kdlm.methods.rewards import RewardMethod, RewardOptions, group_advantages, groups_of
from kdlm.methods.sequences import lay_out
from kdlm.signal import IGNORE_INDEX, Rows, sequence_of


class TurnRewards(RewardMethod):
    """Policy gradient of episodes, each turn by its own advantage: how much better it did than that turn of the group.

    A turn is worth its reward and `discount` times what the next one is worth. Turns that some episodes of a group do
    not have are compared among those that do.

    Args:
        discount: 0 rewards a turn for itself alone, 1 for all that comes after it too.
        options: as of `RewardMethod`.
    """

    def __init__(self, losses=(), *, discount: float = 0.0, **options: Any):
        super().__init__(losses, **options)
        self.discount = discount

    @property
    def needs(self) -> frozenset[str]:
        return super().needs | {"turns"}

    def worth(self, batch: Batch) -> Float[Tensor, "sequences turns"]:
        """Return what each turn is worth; NaN where there is none."""
        return discounted(batch["turn_rewards"], self.discount)

    def turn_advantages(self, batch: Batch) -> Float[Tensor, "sequences turns"]:
        """Return the advantage of each turn in its group; 0 where there is none."""
        kind: dict[str, bool] = {"leave_one_out": self.leave_one_out, "scaled": self.scaled}
        group = groups_of(batch)
        return torch.stack([group_advantages(turn, group, **kind) for turn in self.worth(batch).unbind(1)], 1)

    def advantages_of(self, rows: Rows, batch: Batch) -> Float[Tensor, "rows"]:
        return of_turns(self.turn_advantages(batch), batch, rows.index + 1)


def of_turns(values: Float[Tensor, "sequences turns"], batch: Batch, places: Int[Tensor, "n"]) -> Float[Tensor, "n"]:
    """Return what is known of each turn for the tokens at these places, flattened; at those of no turn anything."""
    sequence, turn = batch["sequence"].flatten()[places], batch["turn"].flatten()[places]
    return values[sequence, turn.clamp(min=0)]


def discounted(rewards: Float[Tensor, "sequences turns"], discount: float) -> Float[Tensor, "sequences turns"]:
    """Return each turn's reward and `discount` times what the next is worth; NaN, no turn, is worth nothing."""
    worth = rewards.clone()
    for turn in reversed(range(rewards.shape[1] - 1)):
        worth[:, turn] += discount * worth[:, turn + 1].nan_to_num(0.0)
    return worth


def begins(batch: Batch) -> Int[Tensor, "tokens"]:
    """Return for each token, flattened, the place of the first trained one of its sequence; that of none is the end."""
    number, trained = sequence_of(batch).flatten(), (batch["labels"] != IGNORE_INDEX).flatten()
    place = torch.arange(len(number), device=number.device)
    first = number.new_full((int(number.max()) + 1,), len(number))
    return first.scatter_reduce(0, number[trained], place[trained], "amin")[number]


def said_in(batch: Batch) -> Bool[Tensor, "batch length"]:
    """Return which tokens an environment said; none of episodes that are not trained on."""
    ids = batch["input_ids"]
    place = torch.arange(ids.numel(), device=ids.device)
    said = (place > begins(batch)) & (batch["turn"].flatten() < 0)
    if "attention_mask" in batch:
        said &= batch["attention_mask"].flatten().bool()
    return said.view_as(ids)


def later_turns(batch: Batch) -> Batch:
    """Return a batch of every turn but the first, each read right after the prompt of its episode.

    Its sequences are `[x0, y_t]`, for t = 1 and on, with labels at y_t, laid out as the given batch is. `at`
    `[batch, length]` is where each token stands in that one, flattened. A batch without such turns gives two tokens
    without labels, so that every rank has something to read.
    """
    number, turn = sequence_of(batch).flatten(), batch["turn"].flatten()
    trained = (batch["labels"] != IGNORE_INDEX).flatten()
    prompt = torch.arange(len(number), device=number.device) < begins(batch)
    places, groups, size = [], [], int(number.max()) + 1
    for which in range(1, batch["turn_rewards"].shape[1]):
        own = trained & (turn == which)
        there = torch.zeros(size, dtype=torch.bool, device=own.device).index_fill(0, number[own], True)
        places.append((own | (prompt & there[number])).nonzero().squeeze(1))
        groups.append(number[places[-1]] + which * size)
    at = torch.cat(places) if places else number[:0]
    group = torch.cat(groups) if groups else number[:0]
    labels = batch["labels"].flatten()
    if not len(at):
        at, group, labels = torch.arange(2, device=number.device), number[:2] * 0, torch.full_like(labels, IGNORE_INDEX)
    return _laid_out(batch, at, group, labels)


def _laid_out(batch: Batch, at: Tensor, group: Tensor, labels: Tensor) -> Batch:
    """Return the tokens at some places as sequences of their own, one for each number of `group`."""
    _, line, lengths = group.unique(return_inverse=True, return_counts=True)
    mask, position = lay_out(torch.ones_like(at), line, lengths, 0)
    if "attention_mask" not in batch:
        ids = batch["input_ids"].flatten()[at]
        return {
            "input_ids": ids[None],
            "labels": labels[at].masked_fill(position == 0, IGNORE_INDEX)[None],
            "position_ids": position[None],
            "at": at[None],
        }
    place, _ = lay_out(at, line, lengths, 0)
    shown = mask.bool()
    return {
        "input_ids": batch["input_ids"].flatten()[place].masked_fill(~shown, 0),
        "labels": labels[place].masked_fill(~shown, IGNORE_INDEX),
        "attention_mask": mask.to(batch["attention_mask"]),
        "at": place,
    }


class TurnOptions(RewardOptions):
    """What can be asked of any method that rewards turns."""

    discount: float = Field(0.0, ge=0, le=1)
    """What a turn is worth beside its own reward: this times what the next one is worth."""
