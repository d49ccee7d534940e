"""The arms of cross_tokenizer_quality.py: one student trained one way, and its bits per byte."""

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from cross_tokenizer_rows import (
    PROMPT,
    ROW,
    SHORTEST,
    STUDENTS,
    TEACHER,
    bits_per_byte,
    folder,
    held_out,
    pieces,
    reading,
    rows,
    tokenizer,
)
from torch import Tensor
from transformers import AutoModelForCausalLM, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from kdlm import DistillTrainer
from kdlm.data import Collator
from kdlm.data.load import text_collator
from kdlm.losses import CrossEntropy, ForwardKL, kept_rows
from kdlm.methods import ALM, DSKD, GOLD, ULD, ByteKD, LogitKD, SequenceKD, SharedVocabularyKD, VocabularyProjection
from kdlm.signal import Hidden, Rows
from kdlm.teachers import LocalTeacher

BATCH = 8


@dataclass(frozen=True)
class Arm:
    """One student trained one way.

    Attributes:
        student: `unigram`, `bytes` or `4k`.
        text: `human` or `teacher-made`.
        way: a name in WAYS.
        options: of the way, as pairs; `ce` is the weight of cross-entropy.
        rate: the learning rate at its peak.
        rows: how many of the text's rows are trained on, the first ones; None takes all.
        scored: one held-out row in so many is scored at the end, and one in six of these on the way.
    """

    student: str
    text: str
    way: str
    seed: int
    steps: int
    rate: float
    options: tuple[tuple[str, Any], ...] = ()
    rows: int | None = None
    scored: int = 1

    @property
    def key(self) -> str:
        """A hash of all that determines the result: the rows, the trainer's settings and kdlm's code too."""
        settings = [asdict(self), ROW, PROMPT, SHORTEST, BATCH, TEACHER, SETTINGS, code()]
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


SETTINGS = {"lr_scheduler_type": "cosine", "adam_beta2": 0.98, "weight_decay": 0.0, "max_grad_norm": 1.0}


def _alm(ce: float = 1.0, **options: Any) -> Any:
    return ALM([CrossEntropy(weight=ce)] if ce else [], **options)


def _uld(ce: float = 1.0, **options: Any) -> Any:
    return ULD([CrossEntropy(weight=ce)], **options)


def _gold(ce: float = 0.0, **options: Any) -> Any:
    return GOLD([CrossEntropy(weight=ce)] if ce else [], **options)


def _shared(ce: float = 1.0, **options: Any) -> Any:
    return SharedVocabularyKD([ForwardKL(), CrossEntropy(weight=ce)], **options)


def _projection(ce: float = 1.0, **options: Any) -> Any:
    return VocabularyProjection([ForwardKL(), CrossEntropy(weight=ce)], **options)


def _dskd(ce: float = 0.5, **options: Any) -> Any:
    return DSKD([CrossEntropy(weight=ce)], **options)


def _byte_kd(ce: float = 0.0) -> Any:
    return ByteKD([ForwardKL(), CrossEntropy(weight=ce)] if ce else [ForwardKL()])


def _kd(ce: float = 0.0) -> Any:
    return LogitKD([ForwardKL(), CrossEntropy(weight=ce)] if ce else [ForwardKL()])


WAYS: dict[str, Callable[..., Any]] = {
    "SFT": lambda: SequenceKD([CrossEntropy()]),
    "ALM": _alm,
    "ULD": _uld,
    "GOLD": _gold,
    "shared vocabulary": _shared,
    "projection": _projection,
    "DSKD": _dskd,
    "KD": _kd,
    "byte KD": _byte_kd,
}


@cache
def code() -> str:
    """Return a hash of kdlm's code."""
    found = hashlib.sha256()
    for path in sorted((Path(__file__).resolve().parent.parent / "kdlm").rglob("*.py")):
        found.update(path.read_bytes())
    return found.hexdigest()


class Curve(TrainerCallback):
    """Evaluates the student ten times, on a few held-out rows."""

    def __init__(self, student: Any, given: list[dict[str, Any]], steps: int):
        self.student, self.given, self.every = student, given, max(1, steps // 10)
        self.points: list[tuple[int, float]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            self.student.eval()
            self.points.append((state.global_step, bits_per_byte(self.student, self.given)))
            self.student.train()


def arguments(output: str, arm: Arm) -> dict[str, Any]:
    """Return training arguments that every trainer here is given."""
    return {
        **{"output_dir": output, "max_steps": arm.steps, "per_device_train_batch_size": BATCH},
        **{"learning_rate": arm.rate, "warmup_steps": max(1, arm.steps // 20), "seed": arm.seed, **SETTINGS},
        **{"logging_strategy": "no", "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True},
    }


def initial(name: str, seed: int) -> Any:
    """Return an untrained student of a sandbox student's shape, with the seed's own weights."""
    model = AutoModelForCausalLM.from_pretrained(folder(name))
    torch.manual_seed(seed)
    return type(model)(model.config)


class Remembered(LocalTeacher):
    """The teacher, whose last hidden states on a text's rows were computed once: arms differ in nothing else.

    Args:
        text, count: whose rows and how many of them; their `index` says which.
        work: where the hidden states are kept between arms.
    """

    def __init__(self, text: str, count: int | None, work: Path):
        super().__init__(AutoModelForCausalLM.from_pretrained(folder(TEACHER)))
        path = work / f"{text}-{count}-{ROW}-{PROMPT}-{SHORTEST}-{folder(TEACHER).name}.pt"
        if not path.is_file():
            read = [reading(TEACHER, *piece) for piece in pieces(text)[:count]]
            partial = path.with_suffix(f".{os.getpid()}")
            torch.save([self._states(Collator(0)([row])) for row in read], partial)
            partial.rename(path)
        self.states = torch.load(path)
        self.own_head = self._signal(Collator(0)([reading(TEACHER, *pieces(text)[0])])).head

    def _signal(self, batch: dict[str, Any]) -> Any:
        return super().with_layers(batch, kept_rows(batch["labels"]), ())[0]

    def _states(self, batch: dict[str, Any]) -> Tensor:
        return self._signal(batch).hidden

    def with_layers(self, batch: dict[str, Tensor], rows: Rows, layers: Sequence[int]) -> Any:
        return Hidden(torch.cat([self.states[i] for i in batch["index"].tolist()]), self.own_head), []


def trainer_of(arm: Arm, output: str, student: Any, teaching: Any) -> DistillTrainer:
    """Return the trainer of an arm."""
    name, same = STUDENTS[arm.student], arm.student == "4k" or arm.way == "SFT"
    given = rows(arm.student, arm.text, both=not same)[: arm.rows]
    trainer = DistillTrainer(
        student,
        None if arm.way == "SFT" else teaching,
        TrainingArguments(**arguments(output, arm)),
        method=WAYS[arm.way](**dict(arm.options)),
        train_dataset=given,
        processing_class=tokenizer(name),
        data_collator=text_collator("padded", tokenizer(name), None if same else tokenizer(TEACHER)),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def run(arm: Arm, work: Path) -> dict[str, Any]:
    """Train an arm on one thread, or read what an earlier run found, and return its curve."""
    path = work / f"{arm.key}.json"
    if path.is_file():
        return json.loads(path.read_text())
    torch.set_num_threads(1)
    name = STUDENTS[arm.student]
    student = initial(name, arm.seed)
    curve = Curve(student, held_out(name, 6 * arm.scored), arm.steps)
    with tempfile.TemporaryDirectory() as output:
        trainer = trainer_of(arm, output, student, None if arm.way == "SFT" else Remembered(arm.text, arm.rows, work))
        trainer.add_callback(curve)
        began, cpu = time.perf_counter(), time.process_time()
        trainer.train()
        took = {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - cpu}
        trainer.close()
    student.eval()
    found = {
        **asdict(arm),
        "bits_per_byte": bits_per_byte(student, held_out(name, arm.scored)),
        "curve": curve.points,
        **took,
    }
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(found))
    partial.rename(path)
    return found


def agreement() -> dict[str, float]:
    """Return the bits per byte of one untrained student on a few rows, summed here and by kdlm's own evaluation.

    Raises AssertionError where they differ, or where the two count other bytes.
    """
    given, name = rows("unigram", "held out", both=True)[:8], STUDENTS["unigram"]
    student = initial(name, 0)
    with tempfile.TemporaryDirectory() as output:
        trainer = DistillTrainer(
            student,
            LocalTeacher(AutoModelForCausalLM.from_pretrained(folder(TEACHER))),
            TrainingArguments(output_dir=output, report_to="none", use_cpu=True, disable_tqdm=True),
            method=WAYS["ALM"](),
            eval_dataset=given,
            processing_class=tokenizer(name),
            data_collator=text_collator("padded", tokenizer(name), tokenizer(TEACHER)),
        )
        trainer.remove_callback(PrinterCallback)
        by_kdlm = trainer.evaluate()["eval_bits_per_byte"]
        trainer.close()
    by_hand = bits_per_byte(student.eval(), given)
    assert abs(by_hand - by_kdlm) < 1e-4 * by_hand, f"{by_hand} by hand, {by_kdlm} by kdlm"
    return {"by_hand": by_hand, "by_kdlm": by_kdlm}
