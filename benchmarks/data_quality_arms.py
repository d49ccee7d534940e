"""Arms of `data_quality.py`: what each makes of a seed's sums, and trains on."""

from collections.abc import Callable
from functools import partial
from statistics import fmean
from typing import Any, NamedTuple

from data_quality_world import Row, folder, generated, opened, pair, row, streamed, sums, trained
from datasets import Dataset, disable_progress_bars

from kdlm.curation.divergence import Divergence
from kdlm.curation.paced import Paced
from kdlm.curation.pairs import Pairs
from kdlm.curation.score import Score
from kdlm.curation.select import Select
from kdlm.curation.step import Desk
from kdlm.losses import CrossEntropy, ForwardKL, ReverseKL
from kdlm.losses.schedule import Step
from kdlm.methods import REDI, LogitKD, SequenceKD
from kdlm.writers import LocalSection

disable_progress_bars()

RATE, PAIR_RATE, KD_RATE = 5e-4, 2e-5, 2e-4
PAIR_SHARE = 0.15  # of REDI's tokens; the others are of its first stage
COOL = 0.3  # temperature of DASD's first stage


class Plan(NamedTuple):
    """How much there is to learn from.

    Attributes:
        each: sums of a level.
        attempts: of the student at each of them.
        solutions: of the teacher, at each temperature.
        tokens: that an arm trains on.
        held_out: sums of a level on which it is measured.
    """

    each: int
    attempts: int
    solutions: int
    tokens: int
    held_out: int


class World:
    """What the arms of a seed share: sums, the student's pass rates, the teacher's solutions."""

    def __init__(self, plan: Plan, seed: int):
        self.plan, self.seed = plan, seed
        problems = sums(seed, plan.each, held_out=False)
        write = partial(generated, problems=problems)
        teacher = opened("teacher")
        attempts = write(opened("start"), temperature=1.0, samples=plan.attempts, seed=seed + 1)
        self.rates = dict(zip(attempts["prompt_id"], attempts["solved"], strict=True))
        self.solutions = write(teacher, temperature=1.0, samples=plan.solutions, seed=seed + 2)
        self.cool = write(teacher, temperature=COOL, samples=plan.solutions, seed=seed + 3)
        self.solved = {
            str(level): {
                "student": fmean(of(attempts, level)["score"]),
                "teacher": fmean(of(self.solutions, level)["score"]),
            }
            for level in sorted(set(attempts["level"]))
        }

    def train(self, student: Any, rows: list[Row], method: Any, *, share: float = 1.0, rate: float = RATE, **options):
        """Train on so large a share of the arm's tokens; `drawn_by` gives each row a weight to be drawn by."""
        stream = streamed(rows, share * self.plan.tokens, self.seed, options.pop("drawn_by", None))
        trained(student, stream, method, rate=rate, seed=self.seed, **options)


def of(rows: Dataset, level: int) -> Dataset:
    return rows.filter(lambda one: one["level"] == level)


def right_ones(rows: Dataset) -> Dataset:
    return rows.filter(lambda one: one["score"] == 1.0)


def texts(rows: Dataset) -> list[Row]:
    weights = rows["weight"] if "weight" in rows.column_names else [1.0] * len(rows)
    return [row(one["prompt"], one["completion"], weight=weight) for one, weight in zip(rows, weights, strict=True)]


def sft(world: World, student: Any, *, verified: bool) -> None:
    rows = right_ones(world.solutions) if verified else world.solutions
    world.train(student, texts(rows), SequenceKD([CrossEntropy()]))


def redi(world: World, student: Any, *, stages: int) -> None:
    first = texts(right_ones(world.solutions))
    world.train(student, first, SequenceKD([CrossEntropy()]), share=1 - PAIR_SHARE)
    if stages == 1:
        return
    pairs: Any = Pairs(per_prompt=None)(world.solutions)
    rows = [pair(one["prompt"], one["chosen"], one["rejected"]) for one in pairs]
    world.train(student, rows, REDI(), share=PAIR_SHARE, rate=PAIR_RATE)


def dasd(world: World, student: Any) -> None:
    """Both models score the solutions; of all prompts together, as a prompt has but one right solution."""
    writers = {name: LocalSection(path=str(folder(name))) for name in ("teacher", "start")}
    desk, rows = Desk(writers), right_ones(world.solutions)
    for into, by in (("teacher", "teacher"), ("student", "start")):
        rows = Score(by=by, into=into, log_probs=True).run(rows, desk)
    chosen = Select(share=0.5, order="highest", by="teacher_gap")(Divergence()(rows))
    desk.close()
    for part in (right_ones(world.cool), chosen):
        world.train(student, texts(part), SequenceKD([CrossEntropy()]), share=0.5)


def kd(
    world: World, student: Any, *, rows: Callable[[World], Dataset], drawn: bool = False, reverse: bool = False
) -> None:
    """KD on rows that are weighed, or drawn, by their weight; with `reverse` in its second half reverse KL."""
    chosen, options = rows(world), {}
    if drawn:
        options["drawn_by"] = chosen["weight"]
        chosen = chosen.remove_columns("weight")
    losses: list[Any] = [ForwardKL()]
    if reverse:
        losses = [
            ForwardKL(weight=Step(values=[1, 0], at=[0.5])),
            ReverseKL(weight=Step(values=[0, 1], at=[0.5])),
        ]
    world.train(student, texts(chosen), LogitKD(losses), rate=KD_RATE, teacher=opened("teacher"), **options)


def all_rows(world: World) -> Dataset:
    return world.solutions


def once_solved(world: World) -> Dataset:
    return world.solutions.filter(lambda one: world.rates[one["prompt_id"]] > 0)


def paced(world: World) -> Dataset:
    rows: Any = world.solutions
    of_student = {"solved": [world.rates[one] for one in rows["prompt_id"]]}
    of_student["attempts"] = [world.plan.attempts] * len(rows)
    return Paced()(Dataset.from_dict({**rows.to_dict(), **of_student}))


ARMS: dict[str, Callable[[World, Any], None]] = {
    "SFT, all": partial(sft, verified=False),
    "SFT": partial(sft, verified=True),
    "REDI, first stage": partial(redi, stages=1),
    "REDI": partial(redi, stages=2),
    "DASD": dasd,
    "KD": partial(kd, rows=all_rows),
    "KD, once solved": partial(kd, rows=once_solved),
    "PACED": partial(kd, rows=paced),
    "PACED, drawn": partial(kd, rows=paced, drawn=True),
    "KD, then reverse": partial(kd, rows=all_rows, reverse=True),
    "PACED, then reverse": partial(kd, rows=paced, reverse=True),
}
