"""OnPolicyTrainer with an environment: episodes of several turns in its batches, logs, samples and checkpoints."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from loopback import source

from kdlm import OnPolicyTrainer
from kdlm.data import Collator
from kdlm.data.load import text_collator
from kdlm.losses import JSD, ReverseKL
from kdlm.methods import ALM, GKD, DistiLLM2, MiniLLM, ReverseKLAdvantage
from kdlm.methods.tsd_kd import TsdKD
from kdlm.rollouts import RolloutSection
from kdlm.samples import SampleLog
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


def prompts(count: int = 8, answers: bool = False) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(5, 500, (4 + number % 4,), generator=generator).tolist() for number in range(count)]
    cut = 3 if answers else 99
    return [
        {
            "input_ids": ids,
            "labels": [IGNORE_INDEX] * len(ids[:cut]) + ids[cut:],
            "index": number,
            "reference": str(number),
        }
        for number, ids in enumerate(rows)
    ]


def score(texts: Any, rows: Any) -> list[float]:
    return [len(text) % 3 / 2 for text in texts]


def trainer(arguments: Any, method: Any = None, *, layout: str = "padded", rollouts: Any = None, **options: Any) -> Any:
    student = source("code-student-tiny")
    reward = options.pop("reward", score)
    rows = options.pop("data", None)
    collator = options.pop("data_collator", Collator(0, layout=layout))  # type: ignore[arg-type]
    made = OnPolicyTrainer(
        student.load().double(),
        source().load().double(),
        arguments(**options),
        method=method or GKD([ReverseKL(), JSD(weight=0.5)], student_share=1.0),
        rollouts=RolloutSection(**{"sampling": SAMPLING, "environment": RETRY, **(rollouts or {})}),
        train_dataset=prompts() if rows is None else rows,
        processing_class=student.tokenizer(),
        data_collator=collator,
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


METHODS = {
    "gkd": lambda: GKD([JSD()], student_share=1.0),
    "reverse_kl_advantage": lambda: ReverseKLAdvantage(prefix_weighting=0.5),
    "minillm": MiniLLM,
    "distillm2": DistiLLM2,
    "tsd_kd": TsdKD,
}


@pytest.mark.parametrize("layout", ["padded", "padding_free"])
@pytest.mark.parametrize("name", METHODS)
def test_no_gradient_comes_from_what_an_environment_said(arguments, name: str, layout: str) -> None:
    """The gradient at the last hidden state of a place is that of the next token alone: other places read others."""
    made = trainer(arguments, METHODS[name](), layout=layout, data=prompts(answers=True))
    kept: list[torch.Tensor] = []

    def hook(module: Any, inputs: Any, out: torch.Tensor) -> None:
        if out.requires_grad:
            out.register_hook(kept.append)

    handle = made.student.model.norm.register_forward_hook(hook)
    (batch,) = seen(made)
    handle.remove()
    felt = sum(gradient.abs().sum(-1) for gradient in kept) > 0
    drawn, trained = batch["sampled"][:, 1:], batch["labels"][:, 1:] != IGNORE_INDEX
    assert not felt[:, :-1][~trained].any()
    assert felt[:, :-1][drawn].float().mean() > 0.4  # tsd_kd chooses some of them
    assert (batch["turn"][:, 1:][felt[:, :-1]] > 0).any()


def test_the_gradient_does_not_show_how_the_batch_was_cut(arguments) -> None:
    whole = weights(trainer(arguments, rollouts={"sampling": {**SAMPLING, "temperature": 0}}))
    for options in (
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
        {"layout": "padding_free"},
    ):
        other = weights(trainer(arguments, rollouts={"sampling": {**SAMPLING, "temperature": 0}}, **options))
        for name, weight in whole.items():
            torch.testing.assert_close(other[name], weight, rtol=1e-8, atol=1e-8)


def test_an_environment_that_is_done_at_once_changes_nothing(arguments) -> None:
    options = {"reward": lambda texts, rows: [1.0] * len(rows), "max_steps": 2}
    plain = trainer(arguments, rollouts={"environment": None}, data=prompts(16), **options)
    once = trainer(arguments, rollouts={"environment": {"name": "retry"}}, data=prompts(16), **options)
    ours, theirs = weights(plain), weights(once)
    assert all(torch.equal(weight, theirs[name]) for name, weight in ours.items())


def test_masked_episodes_train_on_nothing(arguments) -> None:
    (batch,) = seen(trainer(arguments, rollouts={"truncated": "mask"}))
    cut = batch["truncated"]
    assert cut.any() and not cut.all()
    assert (batch["labels"][cut] == IGNORE_INDEX).all() and batch["sampled"][cut].any()


@pytest.mark.parametrize("rollouts", [{"every": 2}, {"every": 2, "reuse": 2}, {"every": 2, "asynchronous": True}])
def test_a_run_that_was_stopped_goes_on_as_the_unbroken_one(arguments, rollouts: dict[str, Any]) -> None:
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "data": prompts(64)}
    whole = trainer(arguments, rollouts=rollouts, **options)
    folder = Path(whole.args.output_dir)
    unbroken = weights(whole)
    waiting = json.loads((folder / "checkpoint-3" / "rollouts_0.json").read_text())
    (one, *_) = waiting["steps"][0]["written"][0]
    assert -1 in one["turns"] and len(one["turn_rewards"]) > 1
    resumed = trainer(arguments, rollouts=rollouts, **options)
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-3"))
    resumed.close()
    for name, weight in resumed.student.named_parameters():
        assert torch.equal(weight, unbroken[name]), name


def test_the_page_of_samples_shows_what_an_environment_said(arguments, tmp_path: Path) -> None:
    made = trainer(arguments, rollouts={"show": 3})
    made.sample_log = SampleLog(tmp_path)
    made.train()
    made.close()
    page, samples = (tmp_path / "samples.html").read_text(), made.sample_log.read()
    assert "No" in "".join(samples[0].tokens) and "<b>" in page and " turns, " in page
    for one in samples:
        assert len(one.tokens) == len(one.divergence) == len(one.log_probs) == len(one.turns or one.tokens)
        said = [turn == -1 for turn in one.turns or []]
        assert all(value == 0 for value, quiet in zip(one.log_probs, said, strict=False) if quiet)
        assert all(value < 0 for value, quiet in zip(one.log_probs, said, strict=False) if not quiet)


def test_a_teacher_with_another_tokenizer_is_refused(arguments) -> None:
    with pytest.raises(ValueError, match=r"rollouts\.environment: a teacher with another tokenizer"):
        ours, theirs = source("code-student-tiny").tokenizer(), source().tokenizer()
        trainer(arguments, ALM(student_share=1.0), data_collator=text_collator("padded", ours, theirs))
