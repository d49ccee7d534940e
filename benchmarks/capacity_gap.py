"""One student, teachers of several sizes, equal tokens: which size teaches best?

    python benchmarks/capacity_gap.py [--check] [--quick] [--save]

The law of the capacity gap (arXiv 2311.07052) says about 2.5 times the student's size. Here teachers of 1 to 29 times
that of a student with 30 thousand weights read the standard library, all the same tokens, and each teaches that student
(random weights, forward KL) for equally many steps. Figures are the held-out cross-entropy of the student in nats per
token over three seeds, which draw its weights and the order of the text. For each seed a parabola in the logarithm of
the ratio is fitted; its lowest point, within the sizes tried, is the optimum, with its standard error over seeds.

--check exits 1 unless the best teacher is neither the smallest nor the largest. --quick takes few steps with one seed:
a smoke test that gates nothing. --save writes benchmarks/results/capacity_gap.json.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

import numpy as np
import torch
from machine import described
from pruned_students import BATCH, WINDOW, healed, text, unseen

ROOT = Path(__file__).resolve().parent.parent
STUDENT = (32, 1)
TEACHERS = {"1x": (32, 1), "2.6x": (48, 2), "5x": (72, 2), "12x": (96, 3), "29x": (136, 4)}
"""Width and layers of each; the names say roughly how many times the student's size that is."""


class Sizes(NamedTuple):
    """How much is trained and read."""

    seeds: int
    teacher_steps: int
    steps: int
    documents: int


WHOLE, QUICK = Sizes(3, 1000, 150, 4), Sizes(1, 10, 4, 1)


def fresh(shape: tuple[int, int], tokenizer: Any, seed: int) -> Any:
    """Return a model of a width and depth with random weights."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    width, layers = shape
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
            num_attention_heads=4, num_key_value_heads=2, head_dim=width // 4, tie_word_embeddings=True,
            bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip


def optimum(ratios: list[float], losses: list[float]) -> float:
    """Return where a parabola in the logarithm of the ratio is lowest within the ratios tried."""
    fit, logs = np.polynomial.Polynomial.fit(np.log(ratios), losses, 2), np.log(ratios)
    grid = np.linspace(logs.min(), logs.max(), 1001)
    return float(np.exp(grid[fit(grid).argmin()]))


def measured(folder: Path, sizes: Sizes) -> dict[str, Any]:
    """Train the teachers, and the student by each of them."""
    from kdlm.estimates import mean
    from kdlm.sandbox import build
    from kdlm.sandbox.language_models import Training
    from kdlm.sandbox.pretraining import pretrain

    tokenizer, data = text(sizes.documents)
    student = fresh(STUDENT, tokenizer, 0).num_parameters()
    found: dict[str, Any] = {}
    for name, shape in TEACHERS.items():
        teacher = fresh(shape, tokenizer, 1000)
        training = Training("teacher", steps=sizes.teacher_steps, batch=8, window=WINDOW, learning_rate=3e-3)
        own = pretrain(teacher, tokenizer, build("code"), training, 0, unseen, name)["held_out_loss"]
        teacher.save_pretrained(folder / name)
        losses = [
            healed(fresh(STUDENT, tokenizer, seed), folder / name, data, tokenizer, seed, sizes.steps)[1]
            for seed in range(sizes.seeds)
        ]
        ratio, spread = teacher.num_parameters() / student, stdev(losses) if len(losses) > 1 else 0.0
        found[name] = {"ratio": ratio, "own loss": own, "student": fmean(losses), "spread": spread, "seeds": losses}
        print(f"{ratio:5.1f}x  own {own:.4f}  student {fmean(losses):.4f} ± {spread:.4f}", flush=True)
    ratios = [one["ratio"] for one in found.values()]
    best = [optimum(ratios, [one["seeds"][seed] for one in found.values()]) for seed in range(sizes.seeds)]
    estimate = mean(best)
    return {"student": student, "teachers": found, "optimum": {**estimate.as_json(), "seeds": best}}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="exit 1 if the gate is missed")
    parser.add_argument("--quick", action="store_true", help="one seed and few steps: a smoke test")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/capacity_gap.json")
    args = parser.parse_args()
    from transformers.utils import logging

    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    sizes = QUICK if args.quick else WHOLE
    with tempfile.TemporaryDirectory() as temporary:
        found = measured(Path(temporary), sizes)
    names = list(found["teachers"])
    best = min(names, key=lambda name: found["teachers"][name]["student"])
    met = best not in (names[0], names[-1])
    if args.save:
        settings = {**sizes._asdict(), "batch": BATCH, "window": WINDOW}
        about = {"machine": described(), "settings": settings, "cpu_seconds": round(sum(os.times()[:2]))}
        path = ROOT / "benchmarks" / "results" / "capacity_gap.json"
        path.write_text(json.dumps({**about, "met": met, **found}, indent=1) + "\n")
    print(f"\n{sum(os.times()[:2]):.0f} s of one core")
    of = found["optimum"]
    error = "" if of["error"] is None else f" ± {of['error']:.1f} (standard error over seeds)"
    print(f"best teacher {best}; the fit's optimum: {of['value']:.1f}{error} times the student's size")
    return 1 if args.check and not args.quick and not met else 0


if __name__ == "__main__":
    sys.exit(main())
