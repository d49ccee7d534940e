"""What does a teacher lose when it is quantised, and what does its student lose by that? Three seeds.

    python benchmarks/quantised_teacher.py [--quick] [--check] [--save]

The sandbox's `code-teacher` is opened in 8 and in 4 bits (bitsandbytes: int8, nf4), and with the weights of its linear
layers but the head rounded to 4, 3 and 2 bits in groups of 64. Loss of the teacher: KL(whole || quantised) on held-out
files, nats a token. Then a student of 0.4M weights learns from each of TEACHERS by forward KL, on the same rows, for
STEPS steps of 4 rows of 128 tokens; loss of the student: its KL(whole teacher || student) less that of the student of
the whole teacher, seed by seed, over the latter.

--check exits 1 unless each teacher loses less with more bits, and no student of a teacher of 8 or 4 bits loses more
than LIMIT on the mean; the figure is on the last line. --quick takes tiny models, one seed and few steps, and gates
nothing. --save writes benchmarks/results/quantised_teacher.json.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from statistics import mean
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

from few_bits import rounded
from machine import described

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 0.02
STEPS, RATE = 25, 2e-3
QUANTISED = ("8bit", "4bit", "int4", "int3", "int2")
TEACHERS = ("whole", "8bit", "4bit", "int2")


def opened(name: str, kind: str) -> Any:
    """Return the teacher, whole or quantised, on a CPU."""
    from kdlm.models import named

    if kind.endswith("bit"):
        return named(name, dtype="float32", quantization=kind).load(device_map={"": "cpu"})
    source = named(name, dtype="float32")
    return source.load() if kind == "whole" else rounded(source, int(kind.removeprefix("int")))


def student_of(teacher: Any, source: Any, data: Any, seed: int, steps: int) -> Any:
    """Return a student that has learnt from a teacher for some steps."""
    from transformers import PrinterCallback, TrainingArguments

    from kdlm import DistillTrainer
    from kdlm.losses import ForwardKL
    from kdlm.methods import LogitKD
    from kdlm.teachers import LocalTeacher

    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=4, learning_rate=RATE, lr_scheduler_type="cosine",
            warmup_steps=5, seed=seed, use_cpu=True, report_to="none", save_strategy="no", logging_steps=steps,
            disable_tqdm=True, dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = DistillTrainer(
            source.load(),
            LocalTeacher(teacher),
            args,
            method=LogitKD([ForwardKL()]),
            train_dataset=data.train,
            data_collator=data.collator,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        trainer.close()
    return trainer.student


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    for flag in ("--quick", "--check", "--save"):
        parser.add_argument(flag, action="store_true")
    args = parser.parse_args()
    import logging

    import torch
    from transformers.utils import logging as hf_logging

    from kdlm.data import DataSection, load_data
    from kdlm.measuring import measure
    from kdlm.models import named

    torch.set_num_threads(1)
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    tiny = "-tiny" if args.quick else ""
    name, seeds, steps = f"sandbox:code-teacher{tiny}", 1 if args.quick else 3, 4 if args.quick else STEPS
    pupil: Any = named(f"sandbox:code-student{tiny}", dtype="float32")
    train: list[Any] = [{"path": "sandbox:code/train", "limit": 60}]
    held: list[Any] = [{"path": "sandbox:code/eval", "limit": 18}]
    data, texts = (
        load_data(DataSection(train=part, max_length=128), pupil.tokenizer(), seed=0) for part in (train, held)
    )
    whole = opened(name, "whole")

    def kl(model: Any) -> dict[str, float]:
        found = measure(
            model, whole, texts.train, limit=16 if args.quick else 64, documents=texts.documents["train"], batch_size=16
        )
        return {key: found["metrics"]["kl_to_teacher"][key] for key in ("value", "error")}

    teachers = {kind: kl(opened(name, kind)) for kind in QUANTISED}
    for kind, one in teachers.items():
        print(f"teacher in {kind}: KL to itself {one['value']:.5f} ± {one['error']:.5f}", flush=True)
    students: dict[str, list[dict[str, float]]] = {kind: [] for kind in TEACHERS}
    for seed in range(seeds):
        for kind in TEACHERS:
            one = kl(student_of(opened(name, kind), pupil, data, seed, steps))
            one["lost"] = one["value"] / students["whole"][seed]["value"] - 1 if kind != "whole" else 0.0
            students[kind].append(one)
            print(f"student of {kind}, seed {seed}: KL to the whole {one['value']:.4f}, {one['lost']:+.2%}", flush=True)
            if args.save:
                settings = {"steps": steps, "learning_rate": RATE, "seeds": seed + 1}
                found = {"machine": described(), "settings": settings, "teachers": teachers, "students": students}
                path = ROOT / "benchmarks" / "results" / "quantised_teacher.json"
                path.write_text(json.dumps(found, indent=1) + "\n")
    lost = {kind: mean(one["lost"] for one in runs) for kind, runs in students.items()}
    order = [teachers[kind]["value"] for kind in ("8bit", "4bit", "int3", "int2")]
    good = order == sorted(order) and max(lost["8bit"], lost["4bit"]) < LIMIT
    print(
        f"a teacher in 4 bits loses {teachers['4bit']['value']:.5f} nats a token, its students {lost['4bit']:+.2%} of "
        f"their KL, over {seeds} seeds"
    )
    return int(args.check and not args.quick and not good)


if __name__ == "__main__":
    sys.exit(main())
