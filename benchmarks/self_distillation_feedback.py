"""Arms of `self_distillation_quality.py` that learn from rewards, alone or with what the verifier says.

Claim 4: all arms draw 15,360 completions and take 240 optimiser steps. Those with two attempts always ask for both, and
each counts as a completion: 4 walks a step in place of 8, each in a group of 8.

    reward alone   policy gradient of single attempts, by group advantages
    rejection      cross-entropy on the right ones of the start's single attempts, in steps of 64 of them
    RLTF-SD, mute  RLTF-SD where the verifier says `Wrong.` or `Right.` and no more
    RLTF-SD        the second attempt, after feedback, also teaches the first
    RLTF-FM        policy gradient of both attempts, and cross-entropy on the feedback
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from self_distillation_world import BATCH, Point, Row, drawn, opened, rollouts, row, trained

from kdlm.losses import CrossEntropy
from kdlm.methods import RLTFFM, RLTFSD, RewardMethod, SequenceKD
from kdlm.rollouts.environments.retry import RetrySection
from kdlm.sandbox.walks import right
from kdlm.verifiers import Judge, Walk

STEPS = 240
GROUP = 8  # completions, or episodes, of a walk
ASKED_AGAIN = RetrySection(turns=2, until_right=False, ask="{feedback}", wrong="Wrong.", right="Right.")
POSITIVE = {"policy_weight": 0.3, "negative_cap": 0.0}  # second attempts that are better than the mean first one only


def mute(texts: Sequence[str], rows: Sequence[Any]) -> list[float]:
    """Return the reward of each text, without a word."""
    return [float(right(one["reference"], text)) for text, one in zip(texts, rows, strict=True)]


def attempted(walks: list[Row], seed: int, *, method: Callable[[], Any], turns: int, said: bool) -> dict[str, Any]:
    again = {"environment": ASKED_AGAIN} if turns == 2 else {}
    references = [one["answer"] for one in walks]
    return {
        "rows": [
            row(one["prompt"], one["completion"], index=n, reference=references[n]) for n, one in enumerate(walks)
        ],
        "method": method(),
        "rollouts": rollouts(GROUP, **again),
        "reward": Judge(Walk()) if said else mute,
        "samples": GROUP * turns,
    }


def rejection(walks: list[Row], seed: int) -> dict[str, Any]:
    asked = [one for one in walks for _ in range(STEPS * BATCH // len(walks))]
    texts = drawn(opened("walks-start"), [one["prompt"] for one in asked], temperature=1.0, seed=seed)
    found = [row(one["prompt"], text) for one, text in zip(asked, texts, strict=True) if right(one["answer"], text)]
    return {"rows": found, "method": SequenceKD([CrossEntropy()])}


HEARING: dict[str, tuple[float, Callable[[list[Row], int], dict[str, Any]]]] = {
    "reward alone": (5e-4, partial(attempted, method=partial(RewardMethod, scaled=True), turns=1, said=False)),
    "rejection": (1e-3, rejection),
    "RLTF-SD, mute": (7e-4, partial(attempted, method=partial(RLTFSD, scaled=True, **POSITIVE), turns=2, said=False)),
    "RLTF-SD": (7e-4, partial(attempted, method=partial(RLTFSD, scaled=True, **POSITIVE), turns=2, said=True)),
    "RLTF-FM": (5e-4, partial(attempted, method=partial(RLTFFM, scaled=True), turns=2, said=True)),
}
"""Arm -> its learning rate, and walks and the seed -> what `trained` is given."""


def hearing(walks: list[Row], seed: int, quick: bool, name: str) -> list[Point]:
    """Return the curve of an arm of claim 4."""
    rate, arm = HEARING[name]
    given, steps = arm(walks, seed), 4 if quick else STEPS
    options = {"steps": steps, "every": steps // 4, "rate": rate, "seed": seed}
    curve = trained(opened("walks-start"), given.pop("rows"), **options, **given)
    spent = STEPS if name == "rejection" else 0  # all are drawn before the first step
    return [{**point, "completions": BATCH * (spent or point["step"])} for point in curve]
