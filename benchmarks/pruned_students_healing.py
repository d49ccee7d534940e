"""The second part of `pruned_students.py`: what heals a model of sums from which layers were left out.

The unpruned model has read sums worked on paper and words turned round (`data_quality_world.py`); `DROP` of its 6
layers go, those that turn the residual stream least. The rows to heal with are sums with answers as somebody else works
them, who writes what is carried first and the digits of a column the other way round: right, and equally long. Arms
learn from as many tokens:

- the answers that are given, or, as a control, the same sums worked as the unpruned model has read them;
- self data (arXiv 2410.09982): what the unpruned model writes itself, the given answer where that is wrong;
- the unpruned model's distributions (forward KL), on the given answers or on self data.

Measured are the share of held-out sums that are right, and what is forgotten: KL(unpruned || healed) on words, of which
no arm sees any.
"""

from collections.abc import Callable
from copy import deepcopy
from statistics import fmean, stdev
from typing import Any, NamedTuple

from data_quality_world import (
    Row,
    folder,
    forgetting,
    generated,
    opened,
    row,
    streamed,
    sums,
    trained,
    worked,
)
from datasets import Dataset

from kdlm.curation import Condition, Desk, FallBack
from kdlm.losses import CrossEntropy, ForwardKL
from kdlm.methods import LogitKD, SequenceKD
from kdlm.models import Pruned

DROP, RATE = 2, 1e-3
TAUGHT = (2, 3, 4)  # digits of the sums to heal with, and of those that are measured
GIVEN, FAMILIAR, SELF = "given answers", "given, in its own hand", "self data"
KD_GIVEN, KD_SELF = "distributions on given answers", "distributions on self data"
ARMS = {
    GIVEN: (GIVEN, False),
    FAMILIAR: (FAMILIAR, False),
    SELF: (SELF, False),
    KD_GIVEN: (GIVEN, True),
    KD_SELF: (SELF, True),
}
"""Arm -> whose answers it reads, and whether it learns the unpruned model's distributions there."""


class Amount(NamedTuple):
    """How much there is to heal with.

    Attributes:
        seeds: of sums and of their order.
        each: sums of a level.
        tokens: that an arm trains on.
        held_out: sums of a level on which it is measured.
    """

    seeds: int
    each: int
    tokens: int
    held_out: int


FULL, FEW = Amount(3, 300, 60_000, 50), Amount(1, 20, 2_000, 5)


def taught(problems: list[Row]) -> list[Row]:
    return [one for one in problems if one["level"] in TAUGHT]


def given(prompt: str) -> str:
    """Return a sum worked in another hand: what is carried in, the lower digit, the upper one, what they make."""
    *columns, answer = worked(prompt[1:-1])
    return "\n".join([*(f"{x[2]}{x[1]}{x[0]}{x[3:]}" for x in columns), answer])


def rewritten(unpruned: Any, problems: list[Row], seed: int) -> Dataset:
    """Return the rows of self-data distillation, as `kdlm generate` makes them: `taken` says which are rewrites."""
    own = generated(unpruned, problems, temperature=0.0, samples=1, seed=seed)
    rows = own.rename_column("completion", "rewritten")
    rows = rows.add_column("completion", [given(prompt) for prompt in rows["prompt"]])  # pyright: ignore
    return FallBack(where=[Condition(column="score", at_least=1)]).run(rows, Desk({}))


def pruned(rows: list[Row]) -> Any:
    section = {
        "name": "pruned",
        "source": {"name": "pretrained", "path": str(folder("deep"))},
        "layers": {"drop": DROP, "tokens": "all"},
        "rows": 64,
    }
    return Pruned.model_validate(section).load_from(rows, seed=0)


def figures(model: Any, held_out: int) -> dict[str, Any]:
    """Return accuracy by level and their mean over the levels that are taught, and what is forgotten."""
    problems = taught(sums(99, held_out, held_out=True))
    found = generated(model.eval(), problems, temperature=0.0, samples=1, seed=7)
    of_level = {level: [one["score"] for one in found if one["level"] == level] for level in TAUGHT}  # pyright: ignore
    levels = {str(level): fmean(scores) for level, scores in of_level.items()}
    return {"accuracy": fmean(levels.values()), "forgotten": forgetting(opened("deep"), model), "levels": levels}


def healing(amount: Amount) -> dict[str, Any]:
    """Prune and heal by every arm; return what each came to, and the unpruned and the pruned model."""
    return summed([seed_of(amount, seed) for seed in range(amount.seeds)])


def seed_of(amount: Amount, seed: int) -> dict[str, Any]:
    """Return the figures of one seed's sums."""
    unpruned, problems = opened("deep"), taught(sums(seed, amount.each, held_out=False))
    texts: dict[str, Callable[[str], str]] = {GIVEN: given, FAMILIAR: lambda it: "\n".join(worked(it[1:-1]))}
    rows = {name: [row(it["prompt"], text(it["prompt"])) for it in problems] for name, text in texts.items()}
    own = rewritten(unpruned, problems, seed)
    rows[SELF] = [row(*it) for it in zip(own["prompt"], own["completion"], strict=True)]
    start = pruned(rows[SELF])
    found: dict[str, Any] = {
        "rewrites": fmean(taken == "rewrite" for taken in own["taken"]),
        "unpruned": _shown("unpruned", figures(unpruned, amount.held_out)),
        "pruned": _shown("pruned", figures(start, amount.held_out)),
        "arms": {},
    }
    for arm, (text, by_teacher) in ARMS.items():
        method = LogitKD([ForwardKL()]) if by_teacher else SequenceKD([CrossEntropy()])
        student, stream = deepcopy(start), streamed(rows[text], amount.tokens, seed)
        trained(student, stream, method, rate=RATE, seed=seed, teacher=opened("deep") if by_teacher else None)
        found["arms"][arm] = _shown(f"seed {seed}, {arm}", figures(student, amount.held_out))
    return found


def summed(seeds: list[dict[str, Any]]) -> dict[str, Any]:
    """Return means, spreads and what each seed came to, for every arm."""
    arms: dict[str, Any] = {}
    for arm in ARMS:
        each = [seed["arms"][arm] for seed in seeds]
        arms[arm] = {key: fmean(one[key] for one in each) for key in ("accuracy", "forgotten")}
        arms[arm] |= {f"{key}_spread": _spread([one[key] for one in each]) for key in list(arms[arm])}
        arms[arm]["seeds"] = each
    before = {key: seeds[0][key] for key in ("unpruned", "pruned")}
    return {**before, "rewrites": [seed["rewrites"] for seed in seeds], "arms": arms}


def _spread(values: list[float]) -> float:
    return stdev(values) if len(values) > 1 else 0.0


def _shown(name: str, one: dict[str, Any]) -> dict[str, Any]:
    print(f"{name}: {one['accuracy']:.3f} right, {one['forgotten']:.4f} nats forgotten", flush=True)
    return one
