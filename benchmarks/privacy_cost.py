"""What differential privacy costs in time: a private step beside a plain one, on given text and on the student's own.

    python benchmarks/privacy_cost.py [--quick] [--check] [--save]

The sandbox's student learns from its teacher on a CPU, on one thread, from 64-token rows of library code, 8 of them in
a plain step and in the mean of a private one. Both make the same steps: forward and backward of student and teacher,
and on the student's own text 32 new tokens behind 32 given ones. A private step has one backward pass for each row, and
clips, adds noise and accounts (by Renyi orders, at every line of the log, of which there is one in a block).

Blocks of steps of both run in turns, in an order that changes. Seconds are of processor time, for a row that was
trained on (private steps have more or fewer rows), and the figure is the median over the turns of private over plain.

--check exits 1 where a private row takes more than LIMIT times a plain one's time. --quick takes two turns of tiny
models, where what a step costs beside its arithmetic weighs more (it may be QUICK_LIMIT). --save writes
benchmarks/results/privacy_cost.json.
"""

import sys
import tempfile
import time
from statistics import median
from typing import Any

from command import options, save

BATCH, LENGTH, PROMPT = 8, 64, 32
LIMIT = 3.0
"""Times a plain row's seconds that a private row may take: twice, and room for a busy machine."""
QUICK_LIMIT = 6.0


def block(kind: str, private: bool, models: tuple[str, str], steps: int, folder: str) -> float:
    """Train for some steps; return the processor seconds of a row."""
    from transformers import TrainerCallback, TrainingArguments

    from kdlm import DistillTrainer, OnPolicyTrainer
    from kdlm.data import DataSection, load_data
    from kdlm.losses import JSD
    from kdlm.methods import GKD
    from kdlm.models import named
    from kdlm.privacy import PrivacySection
    from kdlm.privacy.trainer import PrivateOnPolicyTrainer, PrivateTrainer
    from kdlm.rollouts import RolloutSection, Sampling

    student, teacher = (named(f"sandbox:{name}") for name in models)
    tokenizer = student.tokenizer()
    section = DataSection(train=[{"path": "sandbox:code/train", "limit": 40}], max_length=LENGTH)  # pyright: ignore[reportArgumentType]
    data = load_data(section, tokenizer)
    args = TrainingArguments(
        folder, max_steps=steps + 1, per_device_train_batch_size=BATCH, learning_rate=1e-3, use_cpu=True,
        report_to="none", save_strategy="no", logging_steps=steps + 1, disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    options: dict[str, Any] = {
        "method": GKD([JSD()], student_share=float(kind == "own")),
        "train_dataset": data.train,
        "processing_class": tokenizer,
        "data_collator": data.collator,
    }
    if kind == "own":
        sampling = Sampling(max_new_tokens=LENGTH - PROMPT)
        options["rollouts"] = RolloutSection(prompt_tokens=PROMPT, sampling=sampling, show=0)
    if private:
        options["privacy"] = PrivacySection(noise=1.0, seed=0)
    kinds: dict[Any, Any] = {
        ("given", False): DistillTrainer,
        ("given", True): PrivateTrainer,
        ("own", False): OnPolicyTrainer,
        ("own", True): PrivateOnPolicyTrainer,
    }
    trainer = kinds[kind, private](student.load(), teacher.load(), args, **options)
    began: list[float] = []
    rows: list[int] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *given: Any, **more: Any) -> None:
            began.append(time.process_time())

    items = trainer.get_batch_samples

    def counted(*given: Any) -> Any:
        batches, counts = items(*given)
        rows.append(sum(len(one["units"]) if private else len(one["labels"]) for one in batches))
        return batches, counts

    trainer.get_batch_samples = counted
    trainer.add_callback(Clock())
    trainer.train()
    trainer.close()
    return (began[-1] - began[0]) / sum(rows[1:])  # the first step warms up


def measured(models: tuple[str, str], steps: int, turns: int) -> dict[str, Any]:
    """Let private and plain steps take turns; return seconds a row of both, and their ratio."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("given", "own"):
            took: dict[bool, list[float]] = {False: [], True: []}
            for turn in range(turns):
                for private in (False, True) if turn % 2 else (True, False):
                    took[private].append(block(kind, private, models, steps, folder))
            ratios = [one / other for one, other in zip(took[True], took[False], strict=True)]
            found[kind] = {
                "plain_ms_a_row": 1e3 * median(took[False]),
                "private_ms_a_row": 1e3 * median(took[True]),
                "ratio": median(ratios),
                "ratios": ratios,
            }
            print(
                f"{kind} text: a plain row {found[kind]['plain_ms_a_row']:.1f} ms, a private one "
                f"{found[kind]['private_ms_a_row']:.1f} ms, {median(ratios):.2f} times as much "
                f"({min(ratios):.2f} to {max(ratios):.2f})"
            )
    return found


def main() -> int:
    args = options(__doc__)
    models = ("code-student-tiny", "code-teacher-tiny") if args.quick else ("code-student", "code-teacher")
    steps, turns = (6, 2) if args.quick else (10, 5)
    found = measured(models, steps, turns)
    limit = QUICK_LIMIT if args.quick else LIMIT
    worst = max(one["ratio"] for one in found.values())
    if args.save:
        settings = {
            "models": models,
            "batch": BATCH,
            "length": LENGTH,
            "prompt": PROMPT,
            "steps": steps,
            "turns": turns,
        }
        save("privacy_cost", {"settings": settings, "limit": limit, "met": worst <= limit, **found})
    print(f"a private row takes {worst:.2f} times the processor time of a plain one, at most")
    return int(args.check and worst > limit)


if __name__ == "__main__":
    sys.exit(main())
