"""Arms of `self_distillation_quality.py` that learn from what is right: by rejection, by revision, and by GRPO.

Claim 2: all arms draw 40 completions of each walk in all (an episode of two attempts counts as two), and take as many
optimiser steps of 64 texts, at one learning rate.

    RFT, once      cross-entropy on the right ones of 40 completions of the start
    RFT            the same in four rounds, each of 10 completions of the student so far; right ones are kept
    RFT, told why  on the right attempts of 20 episodes of the start, which hears after the first how its walk begins
    SD-Zero        phase 1 on 15 episodes of the start, told `Wrong.` or `Right.`; phase 2 to the reviser it makes
    SD-Zero, told why  phase 1 on 10 episodes, told how the walk begins; phase 2 to a reviser that is told so too

Claim 3: GRPO by TRL, 8 completions of each of 8 walks a step, alone, with a KL to `walks-teacher`, and with that
teacher in its ratio (RLAD).
"""

import json
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from typing import Any

from datasets import Dataset
from self_distillation_world import (
    BATCH,
    LONGEST,
    Curve,
    Point,
    Row,
    drawn,
    ids,
    opened,
    rollouts,
    row,
    tokenizer,
    told_collator,
    trained,
)
from transformers.trainer_callback import PrinterCallback

from kdlm.losses import CrossEntropy, ReverseKL
from kdlm.methods import SequenceKD
from kdlm.methods.method import After, Told
from kdlm.methods.self_distillation.sd_zero import SDZero
from kdlm.methods.self_distillation.sd_zero_revision import SDZeroRevision
from kdlm.rollouts import Written
from kdlm.sandbox.walks import feedback, right
from kdlm.signal import IGNORE_INDEX
from kdlm.teachers import SelfTeacher
from kdlm.verifiers import Judge, Walk

RATE = 1e-3
RIGHT, WRONG = "Right.", "Wrong."

Episode = tuple[Row, str, str, str]
"""A walk, an attempt, what is said of it, and the next attempt."""


class ToldWhy(SDZero):
    """SD-Zero's second phase with the verifier's own words for control where the attempt is wrong."""

    def _control(self, one: Written) -> Told:
        control = super()._control(one)
        return After(one.feedback) if isinstance(control, After) and one.feedback else control


class Run:
    """A student under way, and its curve over optimiser steps and completions drawn."""

    def __init__(self, walks: list[Row], seed: int, quick: bool):
        self.walks, self.seed, self.quick = walks, seed, quick
        self.student = opened("walks-start")
        self.steps = self.completions = 0
        self.curve: list[Point] = []

    def train(self, rows: list[Row], steps: int, **options: Any) -> None:
        steps = 2 if self.quick else steps
        seed = self.seed + 100 * self.steps
        points = trained(self.student, rows, steps=steps, rate=RATE, seed=seed, every=steps, **options)
        self.steps += steps
        self.completions += steps * BATCH if "rollouts" in options else 0
        self.curve.append({**points[-1], "step": self.steps, "completions": self.completions})

    def draw(self, prompts: Sequence[str], samples: int = 1) -> list[str]:
        self.student.eval()
        self.completions += len(prompts) * samples
        seed = 1000 * (self.seed + 1) + self.completions
        return drawn(self.student, prompts, temperature=1.0, seed=seed, samples=samples)

    def attempts(self, samples: int) -> list[tuple[Row, str]]:
        texts = self.draw([one["prompt"] for one in self.walks], samples)
        return list(zip([one for one in self.walks for _ in range(samples)], texts, strict=True))

    def episodes(self, samples: int, why: bool) -> list[Episode]:
        """Return two attempts at each walk, as often as `samples`."""
        first = self.attempts(samples)
        said = [said_of(walk["answer"], text, why) for walk, text in first]
        end = tokenizer().eos_token
        asked = [f"{walk['prompt']}{text}{end}\n{words}\n" for (walk, text), words in zip(first, said, strict=True)]
        return [(*one, words, second) for one, words, second in zip(first, said, self.draw(asked), strict=True)]


def said_of(answer: str, text: str, why: bool) -> str:
    if right(answer, text):
        return RIGHT
    return feedback(answer, text) if why else WRONG


def answered(kept: Sequence[tuple[Row, str]]) -> list[Row]:
    """Return rows of those attempts that are right."""
    good = [(walk, text) for walk, text in kept if right(walk["answer"], text)]
    return [row(walk["prompt"], text, index=n) for n, (walk, text) in enumerate(good)]


def revised(episodes: Sequence[Episode]) -> list[Row]:
    """Return as conversations of two answers those episodes whose second attempt is right."""
    rows, end = [], tokenizer().eos_token_id
    for walk, first, words, second in episodes:
        if right(walk["answer"], second):
            parts = [ids(walk["prompt"]), [*ids(first), end], ids(f"\n{words}\n"), [*ids(second), end]]
            labels = [[IGNORE_INDEX] * len(part) if n % 2 == 0 else part for n, part in enumerate(parts)]
            rows.append({"input_ids": [*chain(*parts)], "labels": [*chain(*labels)], "index": len(rows)})
    return rows


def rejection(run: Run, *, rounds: int, samples: int, steps: int) -> None:
    kept: list[tuple[Row, str]] = []
    for _ in range(rounds):
        kept += run.attempts(samples)
        run.train(answered(kept), steps, method=SequenceKD([CrossEntropy()]))


def rejection_told(run: Run, *, samples: int, steps: int) -> None:
    episodes = run.episodes(samples, why=True)
    both = [(one[0], one[1]) for one in episodes] + [(one[0], one[3]) for one in episodes]
    run.train(answered(both), steps, method=SequenceKD([CrossEntropy()]))


def sd_zero(run: Run, *, samples: int, revising: int, steps: int, why: bool) -> None:
    run.train(revised(run.episodes(samples, why)), revising, method=SDZeroRevision(student_share=0.0))
    asked = [json.dumps({"prompt": one["prompt"]}) for one in run.walks]
    rows = [
        row(one["prompt"], one["completion"], index=n, reference=one["answer"], asked=asked[n])
        for n, one in enumerate(run.walks)
    ]
    run.train(
        rows,
        steps,
        method=(ToldWhy if why else SDZero)([ReverseKL()], right=RIGHT, wrong=WRONG),
        teacher=SelfTeacher("start"),
        rollouts=rollouts(),
        reward=Judge(Walk()),
        data_collator=told_collator(),
    )


REVISING: dict[str, Callable[[Run], None]] = {
    "RFT, once": partial(rejection, rounds=1, samples=40, steps=120),
    "RFT": partial(rejection, rounds=4, samples=10, steps=30),
    "RFT, told why": partial(rejection_told, samples=20, steps=120),
    "SD-Zero": partial(sd_zero, samples=15, revising=100, steps=20, why=False),
    "SD-Zero, told why": partial(sd_zero, samples=10, revising=80, steps=40, why=True),
}


def revising(walks: list[Row], seed: int, quick: bool, name: str) -> list[Point]:
    """Return the curve of an arm of claim 2."""
    run = Run(walks, seed, quick)
    REVISING[name](run)
    return run.curve


REWARDED: dict[str, dict[str, float]] = {"GRPO": {}, "GRPO, KL": {"kl": 0.04}, "RLAD": {"ratio": 0.9}}
REWARDED_STEPS, REWARDED_EVERY = 120, 20


def rewarded(walks: list[Row], seed: int, quick: bool, name: str) -> list[Point]:
    """Return the curve of an arm of claim 3."""
    from trl import GRPOConfig

    from kdlm.reward_trainer import TeacherGRPOTrainer

    steps = 4 if quick else REWARDED_STEPS
    asked = {"prompt": [ids(one["prompt"]) for one in walks], "reference": [one["answer"] for one in walks]}
    student = opened("walks-start")
    curve = Curve(opened("walks-start"), student, min(REWARDED_EVERY, steps))
    with tempfile.TemporaryDirectory() as folder:
        arguments = GRPOConfig(
            output_dir=folder,
            report_to="none",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            max_steps=steps,
            per_device_train_batch_size=BATCH,
            num_generations=8,
            max_completion_length=LONGEST,
            learning_rate=RATE,
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=min(5, steps),
            adam_beta2=0.98,
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            seed=seed,
        )
        trainer = TeacherGRPOTrainer(
            student,
            Judge(Walk()),
            arguments,
            teacher=opened("walks-teacher") if REWARDED[name] else None,
            train_dataset=Dataset.from_dict(asked),
            processing_class=tokenizer(),
            callbacks=[curve],
            **REWARDED[name],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return [{**point, "completions": point["step"] * BATCH} for point in curve.points]


def reached(rows: list[dict[str, Any]], arm: str, seed: int) -> float:
    """Return after how many steps an arm first solves, sampled, what GRPO does at its end; infinity: it never does."""
    curves = {one["arm"]: one["curve"] for one in rows if one["seed"] == seed}
    end = curves["GRPO"][-1]["sampled"]
    return min((point["step"] for point in curves[arm] if point["sampled"] >= end), default=float("inf"))


def against_grpo(rows: list[dict[str, Any]]) -> dict[str, bool]:
    steps = {arm: [reached(rows, arm, seed) for seed in sorted({one["seed"] for one in rows})] for arm in REWARDED}
    print(f"steps to what GRPO solves at its end: {steps}")
    return {
        f"RLAD gets there in fewer steps than {other}": all(
            mine < theirs for mine, theirs in zip(steps["RLAD"], steps[other], strict=True)
        )
        for other in ("GRPO", "GRPO, KL")
    }
