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

from self_distillation_world import Row, rollouts, row

from kdlm.methods import RLTFFM, RLTFSD, RewardMethod
from kdlm.rollouts.environments.retry import RetrySection
from kdlm.sandbox.walks import right
from kdlm.verifiers import Judge, Walk

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


ARMS: dict[str, Any] = {
    "reward alone": partial(rewarded, method=partial(RewardMethod, scaled=True), turns=1, said=False),
    "RLTF-SD, mute": partial(rewarded, method=partial(RLTFSD, scaled=True), turns=2, said=False),
    "RLTF-SD": partial(rewarded, method=partial(RLTFSD, scaled=True), turns=2, said=True),
    "RLTF-FM": partial(rewarded, method=partial(RLTFFM, scaled=True), turns=2, said=True),
}
