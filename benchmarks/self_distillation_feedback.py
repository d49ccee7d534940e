"""Arms of `self_distillation_quality.py`: does a model learn more from what a verifier says than from its reward alone?

All arms draw as many completions: an episode of two attempts counts as two, and is always asked for both.

    reward alone     policy gradient of single attempts, by group advantages
    RLTF-SD, mute    RLTF-SD where the verifier says `Wrong.` or `Right.` and no more
    RLTF-SD          the second attempt, after feedback, also teaches the first
    RLTF-FM          policy gradient of both attempts, and the cross-entropy of the feedback
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from self_distillation_world import BATCH, Row, drawn, opened, rollouts, row

from kdlm.losses import CrossEntropy
from kdlm.methods import RLTFFM, RLTFSD, RewardMethod, SequenceKD
from kdlm.rollouts.environments.retry import RetrySection
from kdlm.sandbox.walks import right
from kdlm.verifiers import Judge, Walk

STEPS = 240
GROUP = 8  # episodes of a prompt
ASKED_AGAIN = RetrySection(turns=2, until_right=False, ask="{feedback}", wrong="Wrong.", right="Right.")


def mute(texts: Sequence[str], rows: Sequence[Any]) -> list[float]:
    """Return the reward of each text, without a word."""
    return [float(right(one["reference"], text)) for text, one in zip(texts, rows, strict=True)]


def rewarded(walks: list[Row], seed: int, *, method: Callable[[], Any], turns: int, said: bool) -> dict[str, Any]:
    again = {"environment": ASKED_AGAIN} if turns == 2 else {}
    return {
        "rows": [
            row(one["prompt"], one["completion"], index=n, reference=one["answer"]) for n, one in enumerate(walks)
        ],
        "method": method(),
        "rollouts": rollouts(GROUP, **again),
        "reward": Judge(Walk()) if said else mute,
        "samples": GROUP * turns,
    }


def kept(walks: list[Row], seed: int, budget: int = STEPS * BATCH) -> dict[str, Any]:
    """Return the right ones of `budget` attempts of the start model, to be learned by cross-entropy."""
    prompts = [one["prompt"] for one in walks for _ in range(budget // len(walks))]
    answers = [one["answer"] for one in walks for _ in range(budget // len(walks))]
    texts = drawn(opened("walks-start"), prompts, temperature=1.0, seed=seed)
    attempts = zip(prompts, texts, answers, strict=True)
    found = [row(prompt, text) for prompt, text, answer in attempts if right(answer, text)]
    return {"rows": found, "method": SequenceKD([CrossEntropy()])}


POSITIVE = {"policy_weight": 0.3, "negative_cap": 0.0}  # second attempts that are better than the first ones only

ARMS: dict[str, Any] = {
    "reward alone": partial(rewarded, method=partial(RewardMethod, scaled=True), turns=1, said=False),
    "rejection": kept,
    "RLTF-SD, mute": partial(rewarded, method=partial(RLTFSD, scaled=True, **POSITIVE), turns=2, said=False),
    "RLTF-SD": partial(rewarded, method=partial(RLTFSD, scaled=True, **POSITIVE), turns=2, said=True),
    "RLTF-FM": partial(rewarded, method=partial(RLTFFM, scaled=True), turns=2, said=True),
}
RATES = {"reward alone": 5e-4, "rejection": 1e-3, "RLTF-SD, mute": 7e-4, "RLTF-SD": 7e-4, "RLTF-FM": 5e-4}
