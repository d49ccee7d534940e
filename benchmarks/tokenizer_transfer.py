"""How much of a model survives a change to bytes, and how soon? The sandbox's teacher, its tokenizer replaced.

    python benchmarks/tokenizer_transfer.py [--check] [--quick] [--save]

`code-teacher-4k` is given a tokenizer of one id per byte. It then trains, at equal steps and text, in five ways:

    SFT, random rows     cross-entropy; the rows of the bytes are drawn like the old ones
    SFT                  cross-entropy; the rows of the bytes are those of the old tokens that are single bytes, here
                         and below
    ALM                  the likelihood of chunks of text, with the model as it was as its teacher
    ALM + hidden         and hidden states wherever both have read the same text, of three of the four layers
    ALM + hidden + SFT   and cross-entropy: method `tokenizer_transfer` as docs/tokenizer_transfer.md has it

The text to train on is what the teacher itself was trained on (`sandbox:code/teacher`), the text to measure on is held
out from both. Quality is the share of the teacher's compression that is left: its bits per byte over the student's, on
the same pieces of text with the same text before them. A student as good as the teacher has 1.

--check exits 1 unless the last way keeps 0.95 where SFT, at the same step of the same schedule, has 0.85 (or, where SFT
does not come so far, at the end). The figure, on the last line, is that way's quality there, and SFT's. --quick takes a
few steps and gates nothing. --save writes results/tokenizer_transfer.json here.
"""

import argparse
import json
import math
import os
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.utils.logging import disable_progress_bar

from kdlm import DistillTrainer
from kdlm.data import DataSection, load_data
from kdlm.losses import CrossEntropy
from kdlm.methods import ALM, SequenceKD, TokenizerTransfer
from kdlm.models import Predictor, Retokenised
from kdlm.teachers import LocalTeacher

ROOT = Path(__file__).resolve().parent.parent
TEACHER, TOKENIZER = "code-teacher-4k", "sandbox:code-tokenizer-bytes"
KEPT, REACHED = 0.95, 0.85
LAYERS = [[1, 0], [2, 1], [3, 3]]  # the student's first layer is left to put bytes together
WAYS = ("ALM + hidden + SFT", "ALM + hidden", "ALM", "SFT", "SFT, random rows")  # the dearest first

disable_progress_bar()
torch.set_num_threads(1)


class Plan(NamedTuple):
    """How long and on what each way trains."""

    steps: int
    points: int
    documents: int
    held_out: int
    batch: int = 2
    length: int = 256
    rate: float = 3e-3


WHOLE = Plan(steps=1_500, points=6, documents=90, held_out=4)
QUICK = Plan(steps=4, points=1, documents=3, held_out=1)


def data_section(plan: Plan) -> DataSection:
    train = {"path": "sandbox:code/teacher", "limit": plan.documents}
    evaluated = {"path": "sandbox:code/eval", "limit": plan.held_out}
    return DataSection.model_validate({"train": [train], "eval": [evaluated], "max_length": plan.length})


def student_section() -> Retokenised:
    source = {"name": "sandbox", "model": TEACHER}
    return Retokenised.model_validate({"source": source, "tokenizer_from": TOKENIZER, "max_position_embeddings": 4096})


def draw_rows(student: Any, old: torch.Tensor) -> None:
    """Draw embedding (and head, which is tied to it) like the old rows, channel by channel."""
    rows = student.get_input_embeddings().weight.data
    noise = torch.randn(rows.shape, generator=torch.Generator().manual_seed(0))
    rows.copy_(old.mean(0) + noise * old.std(0))


@torch.no_grad()
def bits_per_byte(student: Any, teacher: LocalTeacher, data: Any) -> tuple[float, float]:
    """Return how many bits student and teacher need for a byte of the held-out text."""
    student.eval()
    method, nets = ALM(), {"student": Predictor(student), "teacher": teacher}
    sums, size = [0.0, 0.0], 0
    for first in range(0, len(data.eval), 16):
        batch = data.collator([data.eval[i] for i in range(first, min(first + 16, len(data.eval)))])
        readings = method.read(nets, batch)
        size += int(batch["bytes"].sum())
        both = method.token_log_probs(readings), method.teacher_log_probs(readings)
        sums = [total - values.sum().item() / math.log(2) for total, values in zip(sums, both, strict=True)]
    student.train()
    return sums[0] / size, sums[1] / size


def options(way: str, teacher: LocalTeacher) -> dict[str, Any]:
    """Return the trainer's options of a way."""
    if way.startswith("SFT"):
        return {"method": SequenceKD([CrossEntropy()]), "teacher": None}
    if way == "ALM":
        return {"method": ALM(), "teacher": teacher}
    losses = [CrossEntropy()] if way.endswith("SFT") else []
    return {"method": TokenizerTransfer(losses, layers=LAYERS), "teacher": teacher}


class Curve(TrainerCallback):
    """Measures the student at a few steps, by what it was trained on until then."""

    def __init__(self, plan: Plan, student: Any, teacher: LocalTeacher, data: Any):
        self.plan, self.student, self.teacher, self.data = plan, student, teacher, data
        self.bytes, self.points = 0, []
        self.add(0)

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self.data.collator(rows)
        self.bytes += int(batch["bytes"].sum())
        return batch

    def add(self, step: int) -> None:
        ours, theirs = bits_per_byte(self.student, self.teacher, self.data)
        found = {"step": step, "bytes": self.bytes, "bits_per_byte": ours}
        self.points.append({**found, "teacher_bits_per_byte": theirs, "quality": theirs / ours})

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step * self.plan.points % self.plan.steps < self.plan.points:
            self.add(state.global_step)


def measure(plan: Plan, way: str) -> dict[str, Any]:
    """Train one student, on one thread, and return its curve."""
    began = time.perf_counter()
    section = student_section()
    model, student = section.source.load(), section.load()
    data, teacher = load_data(data_section(plan), section.tokenizer(), section.source.tokenizer()), LocalTeacher(model)
    if way.endswith("random rows"):
        draw_rows(student, model.get_input_embeddings().weight.data)
    curve = Curve(plan, student, teacher, data)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            report_to="none",
            use_cpu=True,
            max_steps=plan.steps,
            per_device_train_batch_size=plan.batch,
            learning_rate=plan.rate,
            lr_scheduler_type="cosine",
            warmup_steps=max(1, plan.steps // 20),
            adam_beta2=0.95,
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            seed=0,
        )
        given = {"processing_class": section.tokenizer(), "train_dataset": data.train, "data_collator": data.collator}
        trainer = DistillTrainer(student, args=arguments, callbacks=[curve], **given, **options(way, teacher))
        trainer.data_collator = curve.collate
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    last, seconds = curve.points[-1], time.perf_counter() - began
    print(
        f"  {way:<20}{last['bits_per_byte']:.3f} bits a byte, quality {last['quality']:.3f}, {seconds:.0f} s",
        flush=True,
    )
    return {"way": way, "seconds": seconds, **last, "curve": curve.points}


def reached(rows: dict[str, dict[str, Any]]) -> int:
    """Return the point of the curves where SFT first has the quality to be reached; the last one if nowhere."""
    qualities = [point["quality"] for point in rows["SFT"]["curve"]]
    return next((number for number, quality in enumerate(qualities) if quality >= REACHED), len(qualities) - 1)


def show(rows: dict[str, dict[str, Any]]) -> None:
    curves = {way: rows[way]["curve"] for way in reversed(WAYS)}
    teacher = curves["SFT"][0]["teacher_bits_per_byte"]
    print(f"\nquality, the teacher's {teacher:.3f} bits a byte over the student's, by bytes trained on")
    sizes = [f"{point['bytes']:>10,}" for point in curves["SFT"]]
    print(f"{'':<20}{''.join(sizes)}")
    for way, curve in curves.items():
        qualities = [f"{point['quality']:>10.3f}" for point in curve]
        print(f"{way:<20}{''.join(qualities)}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="exit 1 if the gate is missed")
    parser.add_argument("--quick", action="store_true", help="a few steps; no gate")
    parser.add_argument("--save", action="store_true", help="write the results")
    args = parser.parse_args()
    plan, began = QUICK if args.quick else WHOLE, time.perf_counter()
    section = student_section()
    load_data(data_section(plan), section.tokenizer(), section.source.tokenizer())  # read once, and kept on disk
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        found = pool.map(measure, [plan] * len(WAYS), WAYS)
        rows = {row["way"]: row for row in found}
    show(rows)
    point = reached(rows)
    kept, sft = (rows[way]["curve"][point]["quality"] for way in (WAYS[0], "SFT"))
    if args.save:
        from machine import described

        settings = {**plan._asdict(), "teacher": TEACHER, "tokenizer": TOKENIZER, "layers": LAYERS}
        result = {"machine": described(), "settings": settings, "kept": kept, "sft": sft, "runs": list(rows.values())}
        path = ROOT / "benchmarks" / "results" / "tokenizer_transfer.json"
        path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{time.perf_counter() - began:.0f} s")
    print(f"quality of {WAYS[0]} {kept:.3f} where SFT has {sft:.3f}")
    return 1 if args.check and not args.quick and kept < KEPT else 0


if __name__ == "__main__":
    sys.exit(main())
