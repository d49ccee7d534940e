"""How much of what rounding to few bits loses does distillation from the whole model bring back? Three seeds.

    python benchmarks/few_bits.py [--quick] [--check] [--save]

The teacher is the sandbox's `code-teacher` (2.1M weights), the student the same weights, of BITS bits in groups of 64:
each linear layer but the head. Rounded to the nearest it is the start. Every arm then trains STEPS steps of 4 rows of
128 tokens, with the same rows and learning rate, and is measured on held-out files after its weights were put on the
grid: KL(teacher || student), nats a token, and how much of the start's it takes away.

    cross-entropy   on the text alone, no teacher
    forward_kl, reverse_kl, topkld, cakld   from the whole model: quantisation-aware distillation

Forward KL is also trained on the student whose weights were rounded once and then left free (`rounded once`), and
rounded again at the end: what training underneath the grid is worth.

--check exits 1 unless forward KL takes away LIMIT of the start's KL on every seed; the figure is on the last line.
--quick takes tiny models, one seed and few steps, and gates nothing. --save writes benchmarks/results/few_bits.json.
"""

import sys
import tempfile
import time
from typing import Any

from command import options, save

LIMIT = 0.5
BITS, GROUP, STEPS, RATE = 2, 64, 50, 3e-4
ARMS = ("cross-entropy", "forward_kl", "reverse_kl", "topkld", "cakld", "rounded once")


def rounded(source: Any, bits: int) -> Any:
    """Return the model with its linear layers rounded, as plain ones."""
    from kdlm.models import fake_quantise, on_the_grid
    from kdlm.models.fake_quantised import QuantizationAware

    return on_the_grid(
        fake_quantise(source.load(), QuantizationAware(bits=bits, group_size=min(GROUP, source.config().hidden_size)))
    )


def texts(tokenizer: Any) -> tuple[Any, Any]:
    """Return the data to train on, and the data of other files to measure on."""
    from kdlm.data import DataSection, load_data

    train: list[Any] = [{"path": "sandbox:code/train", "limit": 60}]
    held: list[Any] = [{"path": "sandbox:code/eval", "limit": 18}]
    data, other = (load_data(DataSection(train=part, max_length=128), tokenizer, seed=0) for part in (train, held))
    return data, other


def kl(model: Any, whole: Any, held: Any, rows: int) -> dict[str, float]:
    """Return KL(whole || model) in nats per token on so many rows: `value` and `error`."""
    from kdlm.measuring import measure

    found = measure(model, whole, held.train, limit=rows, documents=held.documents["train"], batch_size=16)
    return {key: found["metrics"]["kl_to_teacher"][key] for key in ("value", "error")}


def distilled(student: Any, teacher: Any, method: Any, data: Any, seed: int, steps: int, rate: float) -> Any:
    """Return the student after some steps of 4 rows; `teacher` is a model, or None."""
    from transformers import PrinterCallback, TrainingArguments

    from kdlm import DistillTrainer
    from kdlm.teachers import LocalTeacher

    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=4, learning_rate=rate, lr_scheduler_type="cosine",
            warmup_steps=5, seed=seed, use_cpu=True, report_to="none", save_strategy="no", logging_steps=steps,
            disable_tqdm=True, dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = DistillTrainer(
            student,
            None if teacher is None else LocalTeacher(teacher),
            args,
            method=method,
            train_dataset=data.train,
            data_collator=data.collator,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        trainer.close()
    return trainer.student


def trained(arm: str, source: Any, data: Any, seed: int, steps: int) -> Any:
    """Return the student that an arm leaves, on the grid."""
    from kdlm.losses import CAKLD, CrossEntropy, ForwardKL, ReverseKL, TopKLD
    from kdlm.methods import LogitKD, SequenceKD
    from kdlm.models import fake_quantise, on_the_grid
    from kdlm.models.fake_quantised import QuantizationAware

    few = QuantizationAware(bits=BITS, group_size=min(GROUP, source.config().hidden_size))
    student = rounded(source, BITS) if arm == "rounded once" else fake_quantise(source.load(), few)
    losses: dict[str, Any] = {"reverse_kl": ReverseKL(), "topkld": TopKLD(), "cakld": CAKLD()}
    if arm == "cross-entropy":
        distilled(student, None, SequenceKD([CrossEntropy()]), data, seed, steps, RATE)
    else:
        distilled(student, source.load(), LogitKD([losses.get(arm, ForwardKL())]), data, seed, steps, RATE)
    return on_the_grid(fake_quantise(student, few) if arm == "rounded once" else student)


def main() -> int:
    args = options(__doc__)
    from kdlm.models import named

    source: Any = named("sandbox:code-teacher-tiny" if args.quick else "sandbox:code-teacher", dtype="float32")
    seeds, steps = (1, 4) if args.quick else (3, STEPS)
    data, held = texts(source.tokenizer())
    teacher, rows = source.load(), 16 if args.quick else 64
    start = {bits: kl(rounded(source, bits), teacher, held, rows) for bits in (2, 3, 4, 8)}
    for bits, one in start.items():
        print(f"rounded to {bits} bits: KL {one['value']:.4f} ± {one['error']:.4f}")
    arms: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
    for seed in range(seeds):
        for arm in ARMS:
            began = time.process_time()
            one = kl(trained(arm, source, data, seed, steps), teacher, held, rows)
            one["recovered"] = 1 - one["value"] / start[BITS]["value"]
            arms[arm].append(one)
            print(
                f"{BITS} bits, seed {seed}, {arm:14}: KL {one['value']:.4f} ± {one['error']:.4f}, "
                f"{one['recovered']:.0%} recovered ({time.process_time() - began:.0f} s)",
                flush=True,
            )
    worst = min(one["recovered"] for one in arms["forward_kl"])
    if args.save:
        settings = {"bits": BITS, "group_size": GROUP, "steps": steps, "learning_rate": RATE, "seeds": seeds}
        save("few_bits", {"settings": settings, "rounded": start, "arms": arms})
    print(f"forward KL takes away at least {worst:.0%} of what rounding to {BITS} bits loses, over {seeds} seeds")
    return int(args.check and not args.quick and worst < LIMIT)


if __name__ == "__main__":
    sys.exit(main())
