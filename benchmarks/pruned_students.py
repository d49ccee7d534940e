"""Students cut from their teacher, healed on the same tokens: experts in two stages or one, layers by angle or spread.

    python benchmarks/pruned_students.py [--part cuts|healing] [--check] [--quick] [--save]

Two teachers read the standard library: a mixture of 8 experts (2 layers, 2 experts a token), and a dense model of 8
layers. Experts are cut to a quarter of their neurons (SlimMoE), in one stage, or through a half on which a third of the
steps are spent; by |gradient x activation| or by weights alone. Of the dense model 3 layers go. All arms then learn
from their teacher (forward KL) on equally many tokens. Figures are the held-out cross-entropy in nats per token,
the mean of three seeds, which draw the order of the text; "cut" is that before healing. The second part, what heals a
model of sums, is told in pruned_students_healing.py.

--check exits 1 unless two stages end below one, and self data heal more than given answers; of layers nothing is gated,
as these differ by less than the noise.
--quick takes few steps with one seed: a smoke test that gates nothing. --save writes
benchmarks/results/pruned_students.json, of one part alone that part of it.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).resolve().parent.parent
BATCH, WINDOW, RATE = 16, 64, 3e-3
ONE, TWO, WEIGHTS = "one stage", "two stages", "one stage, by weights"
BLOCK, EVERY, SPREAD = "block by angle, last tokens", "block by angle, all tokens", "spread evenly"


class Sizes(NamedTuple):
    """How much is trained and read."""

    seeds: int
    teacher_steps: int
    steps: int
    documents: int


WHOLE, QUICK = Sizes(3, 600, 60, 4), Sizes(1, 20, 6, 1)


@contextmanager
def unseen(name: str, steps: int) -> Iterator[Any]:
    """Show no progress."""
    yield lambda count, said: None


def teachers(folder: Path, steps: int) -> None:
    """Train both teachers and write them into `moe` and `dense`."""
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    from kdlm.sandbox import build
    from kdlm.sandbox.language_models import Training
    from kdlm.sandbox.pretraining import pretrain

    tokenizer = AutoTokenizer.from_pretrained(build("code-tokenizer-tiny"))
    common = {
        "vocab_size": len(tokenizer), "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 16, "tie_word_embeddings": True, "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id, "max_position_embeddings": 1024,
    }  # fmt: skip
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True}
    kinds = {
        "moe": lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**common, **experts, num_hidden_layers=2)),
        "dense": lambda: Qwen3ForCausalLM(Qwen3Config(**common, num_hidden_layers=8, intermediate_size=128)),
    }
    for name, make in kinds.items():
        torch.manual_seed(0)
        model = make()
        training = Training("teacher", steps=steps, batch=8, window=WINDOW, learning_rate=3e-3)
        pretrain(model, tokenizer, build("code"), training, 0, unseen, name)
        print(f"{name}: trained, {sum(os.times()[:2]):.0f} s so far", flush=True)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def text(documents: int) -> tuple[Any, Any]:
    """Return the tokenizer, and text to train and to evaluate on."""
    from transformers import AutoTokenizer

    from kdlm.data import DataSection, load_data
    from kdlm.sandbox import build

    tokenizer = AutoTokenizer.from_pretrained(build("code-tokenizer-tiny"))
    sources = {"train": [{"path": "sandbox:code/train"}], "eval": [{"path": "sandbox:code/eval", "limit": documents}]}
    return tokenizer, load_data(DataSection.model_validate({**sources, "max_length": WINDOW}), tokenizer, seed=0)


def cut(source: Path, data: Any, **options: Any) -> Any:
    """Return the student that a recipe's section makes of a model."""
    from kdlm.models import Pruned

    section = {"name": "pruned", "source": {"name": "pretrained", "path": str(source)}, "rows": 64, **options}
    return Pruned.model_validate(section).load_from(data.train, seed=0)


def healed(student: Any, teacher: Path, data: Any, tokenizer: Any, seed: int, steps: int) -> tuple[Any, float]:
    """Distil for so many steps; return the student and its held-out cross-entropy."""
    from transformers import AutoModelForCausalLM, PrinterCallback, TrainingArguments

    from kdlm import DistillTrainer
    from kdlm.losses import ForwardKL
    from kdlm.methods import LogitKD

    with tempfile.TemporaryDirectory() as run:
        args = TrainingArguments(
            run, max_steps=steps, learning_rate=RATE, lr_scheduler_type="cosine", warmup_steps=min(5, steps // 2),
            per_device_train_batch_size=BATCH, per_device_eval_batch_size=64, use_cpu=True, report_to="none",
            save_strategy="no", logging_strategy="no", disable_tqdm=True, dataloader_pin_memory=False, seed=seed,
        )  # fmt: skip
        trainer = DistillTrainer(
            student, AutoModelForCausalLM.from_pretrained(teacher), args, method=LogitKD([ForwardKL()]),
            train_dataset=data.train, eval_dataset=data.eval, processing_class=tokenizer, data_collator=data.collator,
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        if steps:
            trainer.train()
        return trainer.student, trainer.evaluate()["eval_cross_entropy"]


def measured(folder: Path, sizes: Sizes) -> dict[str, Any]:
    """Cut and heal everything; return what each arm came to."""
    from transformers import AutoModelForCausalLM

    from kdlm.models.pruned import Width
    from kdlm.models.pruning import prune

    tokenizer, data = text(sizes.documents)
    moe, dense, heal = folder / "moe", folder / "dense", (data, tokenizer)

    def by_weights() -> Any:
        return prune(AutoModelForCausalLM.from_pretrained(moe), None, Width(moe_intermediate_size=16))

    def staged(seed: int) -> float:
        first = sizes.steps // 3
        half, _ = healed(cut(moe, data, width={"moe_intermediate_size": 32}), moe, *heal, seed, first)
        half.save_pretrained(folder / "half")
        quarter = cut(folder / "half", data, width={"moe_intermediate_size": 16})
        return healed(quarter, moe, *heal, seed + 100, sizes.steps - first)[1]

    arms: dict[str, tuple[Path, Any]] = {
        ONE: (moe, lambda: cut(moe, data, width={"moe_intermediate_size": 16})),
        WEIGHTS: (moe, by_weights),
        BLOCK: (dense, lambda: cut(dense, data, layers={"drop": 3})),
        EVERY: (dense, lambda: cut(dense, data, layers={"drop": 3, "tokens": "all"})),
        SPREAD: (dense, lambda: cut(dense, data, layers=5)),
    }
    found: dict[str, Any] = {"teachers": {path.name: at_once(path, *heal) for path in (moe, dense)}, "arms": {}}
    for name, (teacher, make) in arms.items():
        at_first = healed(make(), teacher, *heal, 0, 0)[1]
        losses = [healed(make(), teacher, *heal, seed, sizes.steps)[1] for seed in range(sizes.seeds)]
        found["arms"][name] = show(name, losses, at_first)
    found["arms"][TWO] = show(TWO, [staged(seed) for seed in range(sizes.seeds)], None)
    return found


def at_once(path: Path, data: Any, tokenizer: Any) -> float:
    from transformers import AutoModelForCausalLM

    loss = healed(AutoModelForCausalLM.from_pretrained(path), path, data, tokenizer, 0, 0)[1]
    print(f"teacher {path.name}: {loss:.4f}", flush=True)
    return loss


def show(name: str, losses: list[float], at_first: float | None) -> dict[str, Any]:
    spread = stdev(losses) if len(losses) > 1 else 0.0
    before = "" if at_first is None else f"cut {at_first:.4f}, "
    print(f"{name:28} {before}healed {fmean(losses):.4f} ± {spread:.4f}", flush=True)
    return {"cut": at_first, "loss": fmean(losses), "spread": spread, "seeds": losses}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=["cuts", "healing"], help="run one part alone")
    parser.add_argument("--check", action="store_true", help="exit 1 if the gate is missed")
    parser.add_argument("--quick", action="store_true", help="one seed and few steps: a smoke test")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/pruned_students.json")
    args = parser.parse_args()
    from transformers.utils import logging

    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    found: dict[str, Any] = {}
    met = True
    if args.part != "healing":
        found, met = cuts(quick=args.quick)
    if args.part != "cuts":
        sys.path.insert(0, str(ROOT / "benchmarks"))
        from pruned_students_healing import FEW, FULL, GIVEN, SELF, healing

        found["healing"] = timed(FEW if args.quick else FULL, healing)
        right = {name: arm["accuracy"] for name, arm in found["healing"]["arms"].items()}
        print(f"self data - given answers: {right[SELF] - right[GIVEN]:+.3f} right")
        met &= right[SELF] > right[GIVEN]
    if args.save:
        path = ROOT / "benchmarks" / "results" / "pruned_students.json"
        before = json.loads(path.read_text()) if path.is_file() and args.part else {}
        path.write_text(json.dumps(before | found, indent=1) + "\n")
    return 1 if args.check and not args.quick and not met else 0


def timed(sizes: Any, measure: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
    """Measure, and tell on what machine, by how much, and in how many seconds of one core."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from machine import described

    began = sum(os.times()[:2])
    found = measure(sizes)
    seconds = round(sum(os.times()[:2]) - began)
    print(f"\n{seconds} s of one core")
    return {"machine": described(), "settings": sizes._asdict(), "cpu_seconds": seconds, **found}


def cuts(*, quick: bool) -> tuple[dict[str, Any], bool]:
    """Return what cutting and healing came to, and whether two stages end below one."""

    def measure(sizes: Sizes) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as temporary:
            teachers(Path(temporary), sizes.teacher_steps)
            return measured(Path(temporary), sizes)

    found = timed(QUICK if quick else WHOLE, measure)
    loss = {name: arm["loss"] for name, arm in found["arms"].items()}
    print(f"block by angle - spread layers: {loss[BLOCK] - loss[SPREAD]:+.4f}")
    print(f"two stages - one: {loss[TWO] - loss[ONE]:+.4f}")
    met = loss[TWO] < loss[ONE]
    return {**found, "met": met}, met


if __name__ == "__main__":
    sys.exit(main())
