"""OnPolicyTrainer with an environment: episodes of several turns in its batches, logs, samples and checkpoints."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from loopback import source

from kdlm import OnPolicyTrainer
from kdlm.data import Collator
from kdlm.losses import JSD, ReverseKL
from kdlm.methods import GKD, MiniLLM, ReverseKLAdvantage
from kdlm.rollouts import RolloutSection
from kdlm.signal import IGNORE_INDEX

SAMPLING = {"max_new_tokens": 6}
RETRY = {"name": "retry", "turns": 3, "until_right": False, "ask": "No. Again"}


class Ends:
    """Wraps an engine: what was cut ends with the end token instead, so that tiny models take turns."""

    def __init__(self, engine: Any, end: int):
        self.engine, self.end, self.lives = engine, end, engine.lives

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def generate(self, prompts: Any, sampling: Any, seed: int) -> list[Any]:
        from dataclasses import replace

        drawn = self.engine.generate(prompts, sampling, seed)
        return [
            one if one.stop == "end" or number % 5 == 4 else replace(one, ids=[*one.ids[:-1], self.end], stop="end")
            for number, one in enumerate(drawn)
        ]


def prompts(count: int = 8) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(5, 500, (4 + number % 4,), generator=generator).tolist() for number in range(count)]
    return [
        {"input_ids": ids, "labels": [IGNORE_INDEX] * len(ids), "index": number, "reference": str(number)}
        for number, ids in enumerate(rows)
    ]


def score(texts: Any, rows: Any) -> list[float]:
    return [len(text) % 3 / 2 for text in texts]


def trainer(arguments: Any, method: Any = None, *, layout: str = "padded", rollouts: Any = None, **options: Any) -> Any:
    student = source("code-student-tiny")
    reward = options.pop("reward", score)
    rows = options.pop("data", None)
    made = OnPolicyTrainer(
        student.load().double(),
        source().load().double(),
        arguments(**options),
        method=method or GKD([ReverseKL(), JSD(weight=0.5)], student_share=1.0),
        rollouts=RolloutSection(**{"sampling": SAMPLING, "environment": RETRY, **(rollouts or {})}),
        train_dataset=prompts() if rows is None else rows,
        processing_class=student.tokenizer(),
        data_collator=Collator(0, layout=layout),  # type: ignore[arg-type]
        reward=reward,
    )
    made.networks.double()
    made.rounds.engine = Ends(made.rounds.engine, made.processing_class.eos_token_id)
    return made


def seen(made: Any) -> list[dict[str, torch.Tensor]]:
    """Train, and return every batch that the method saw."""
    batches: list[dict[str, torch.Tensor]] = []
    losses = made.method.losses
    made.method.losses = lambda nets, batch, *rest: batches.append(batch) or losses(nets, batch, *rest)
    made.train()
    made.close()
    return batches


def weights(made: Any) -> dict[str, torch.Tensor]:
    made.train()
    made.close()
    return {name: p.detach().clone() for name, p in made.student.named_parameters()}


@pytest.mark.parametrize("layout", ["padded", "padding_free"])
def test_a_batch_says_of_every_token_in_which_turn_it_was_drawn(arguments, layout: str) -> None:
    (batch,) = seen(trainer(arguments, layout=layout))
    turn, sampled = batch["turn"], batch["sampled"]
    assert turn.shape == sampled.shape == batch["input_ids"].shape
    assert ((turn >= 0) == sampled).all() and ((batch["labels"] != IGNORE_INDEX) == sampled).all()
    assert (batch["log_probs"][~sampled] == 0).all() and turn.max() == 2
    rewards = batch["turn_rewards"]
    assert rewards.shape == (8, 3)
    counts = (~rewards.isnan()).sum(1)
    last = rewards.gather(1, counts[:, None] - 1)[:, 0]
    assert (last == batch["reward"]).all() and batch["truncated"].any()


def test_the_environments_words_stand_between_the_turns(arguments) -> None:
    made = trainer(arguments)
    (batch,) = seen(made)
    read = made.processing_class.decode
    for ids, turn in zip(batch["input_ids"], batch["turn"], strict=True):
        drawn = (turn >= 0).nonzero()[:, 0]
        between = [
            ids[left + 1 : right]
            for left, right in zip(drawn[:-1].tolist(), drawn[1:].tolist(), strict=True)
            if right - left > 1
        ]
        assert all(read(one) == "\nNo. Again\n" for one in between) and len(between) == turn.max()


def test_a_log_line_and_an_evaluation_count_turns_and_successes(arguments) -> None:
    from datasets import Dataset

    made = trainer(arguments, rollouts={"eval_prompts": 4})
    made.eval_dataset = Dataset.from_list(
        [{**row, "labels": [*row["labels"][:3], *row["input_ids"][3:]]} for row in prompts()]
    )
    made.train()
    log = next(log for log in made.state.log_history if "loss" in log)
    assert 1 < log["rollout/turns"] <= 3 and 0 <= log["rollout/success"] <= 1 and log["rollout/length"] <= 18
    metrics = made.evaluate()
    assert 1 < metrics["eval_rollout_turns"] <= 3 and 0 <= metrics["eval_rollout_success"] <= 1
    made.close()
