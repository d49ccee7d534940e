"""The small world of self-distillation: its tasks, and the two models that have read its lessons."""

from kdlm.sandbox.datasets import TaskSet
from kdlm.sandbox.entry import Entry
from kdlm.sandbox.language_models import LanguageModel, Shape, Training
from kdlm.sandbox.lessons import Lessons

WALKER = Shape(width=64, layers=2, heads=4, feed_forward=128)


def _walker(file: str) -> LanguageModel:
    training = Training(file, steps=2_400, batch=16, window=128, learning_rate=5e-3)
    return LanguageModel("code-tokenizer-bytes", WALKER, seed=0, data="lessons", training=training)


WALKERS = (
    Entry("walks", "where moves lead, some of them new", "2000 + 500 rows", 1, TaskSet("walks", 2_000, 500, 0, (2,))),
    Entry("reversals", "words backwards", "2000 + 500 rows", 1, TaskSet("reversals", 2_000, 500, 0, (1,))),
    Entry("lessons", "what the walkers have read", "2 x 60000 texts", 6, Lessons(n=60_000, eval=1_000, seed=0)),
    Entry("walks-start", "does not know the new moves, uses what it is told", "0.1 M parameters", 80, _walker("start")),
    Entry("walks-teacher", "knows them all", "0.1 M parameters", 80, _walker("teacher")),
)
