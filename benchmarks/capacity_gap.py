"""One student, teachers of several sizes, equal tokens: which size teaches best?

    python benchmarks/capacity_gap.py [--check] [--quick] [--save]

The law of the capacity gap (arXiv 2311.07052) says about 2.5 times the student's size. Here teachers of 1.4 to 12 times
that of a student with 26 thousand weights read the standard library, all the same tokens, and each teaches that student
(random weights, forward KL) for equally many steps. Figures are the held-out cross-entropy of the student in nats per
token over three seeds, which draw the weights of teacher and student and the order of the text. For each seed a
parabola in the logarithm of the ratio is fitted; its lowest point within the sizes tried is the optimum. Its mean over
seeds is that of logarithms, its standard error a factor; a lowest point at an end says that the optimum is not between.

--check exits 1 unless the best teacher is neither the smallest nor the largest. --quick takes few steps with one seed:
a smoke test that gates nothing. --save writes benchmarks/results/capacity_gap.json.
"""

import os
import sys
import tempfile
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import torch
from command import options, save
from pruned_students import BATCH, WINDOW, healed, text, unseen

STUDENT = (32, 1)
TEACHERS = {"1.4x": (40, 1), "2.6x": (48, 2), "5x": (72, 2), "12x": (96, 3)}
"""Width and layers of each; the names say roughly how many times the student's size that is."""


class Sizes(NamedTuple):
    """How much is trained and read."""

    seeds: int
    teacher_steps: int
    steps: int
    documents: int


WHOLE, QUICK = Sizes(3, 600, 300, 4), Sizes(1, 10, 4, 1)


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


def taught(shape: tuple[int, int], folder: Path, seed: int, sizes: Sizes, tokenizer: Any, data: Any) -> tuple[Any, ...]:
    """Train a teacher and a student by it; return the teacher's number of weights, its loss and the student's."""
    from kdlm.sandbox import build
    from kdlm.sandbox.language_models import Training
    from kdlm.sandbox.pretraining import pretrain

    teacher = fresh(shape, tokenizer, 1000 + seed)
    training = Training("teacher", steps=sizes.teacher_steps, batch=8, window=WINDOW, learning_rate=3e-3)
    own = pretrain(teacher, tokenizer, build("code"), training, seed, unseen, "teacher")["held_out_loss"]
    teacher.save_pretrained(folder)
    student = fresh(STUDENT, tokenizer, seed)
    return teacher.num_parameters(), own, healed(student, folder, data, tokenizer, seed, sizes.steps)[1]


def measured(folder: Path, sizes: Sizes) -> dict[str, Any]:
    """Train the teachers, and the student by each of them; return the losses and what they say of the best size."""
    tokenizer, data = text(sizes.documents)
    student = fresh(STUDENT, tokenizer, 0).num_parameters()
    found: dict[str, Any] = {}
    for name, shape in TEACHERS.items():
        runs = [taught(shape, folder / f"{name}-{seed}", seed, sizes, tokenizer, data) for seed in range(sizes.seeds)]
        weights, own, losses = (list(column) for column in zip(*runs, strict=True))
        found[name] = {"ratio": weights[0] / student, "own": own, "seeds": losses, "student": fmean(losses)}
        each = " ".join(f"{loss:.4f}" for loss in losses)
        print(
            f"{name:5} own {fmean(own):.4f}  student {fmean(losses):.4f}  by seed {each}  "
            f"({sum(os.times()[:2]):.0f} s so far)",
            flush=True,
        )
    return {"student": student, "teachers": found, **summed_up(found)}


def summed_up(teachers: dict[str, Any]) -> dict[str, Any]:
    """Return the fitted optimum with its error, and how far the others are above the best teacher, seed by seed."""
    from kdlm.estimates import mean, paired

    ratios = [one["ratio"] for one in teachers.values()]
    best = [optimum(ratios, list(losses)) for losses in zip(*(one["seeds"] for one in teachers.values()), strict=True)]
    logs = mean(np.log(best).tolist()).as_json()
    factor = None if logs["error"] is None else float(np.exp(logs["error"]))
    lowest = min(teachers, key=lambda name: teachers[name]["student"])
    above = {
        name: paired(one["seeds"], teachers[lowest]["seeds"]).as_json()
        for name, one in teachers.items()
        if name != lowest
    }
    at_an_end = sum(bool(np.isclose(one, [min(ratios), max(ratios)]).any()) for one in best)
    fitted = {"ratio": float(np.exp(logs["value"])), "error factor": factor, "seeds": best, "at an end": at_an_end}
    return {"optimum": fitted, "best": lowest, "above the best": above}


def main() -> int:
    args = options(__doc__)
    sizes = QUICK if args.quick else WHOLE
    with tempfile.TemporaryDirectory() as temporary:
        found = measured(Path(temporary), sizes)
    names = list(found["teachers"])
    met = found["best"] not in (names[0], names[-1])
    if args.save:
        settings = {**sizes._asdict(), "batch": BATCH, "window": WINDOW}
        about = {"settings": settings, "cpu_seconds": round(sum(os.times()[:2]))}
        save("capacity_gap", {**about, "met": met, **found})
    print(f"\n{sum(os.times()[:2]):.0f} s of one core")
    for name, one in found["above the best"].items():
        error = "" if one["error"] is None else f" ± {one['error']:.4f}"
        print(f"{name} above {found['best']}: {one['value']:+.4f}{error}")
    of = found["optimum"]
    error = "" if of["error factor"] is None else f", times or divided by {of['error factor']:.2f} (standard error)"
    print(
        f"best teacher {found['best']}; the fit's optimum: {of['ratio']:.1f} times the student's size{error}, "
        f"at an end on {of['at an end']} of {sizes.seeds} seeds"
    )
    return 1 if args.check and not args.quick and not met else 0


if __name__ == "__main__":
    sys.exit(main())
