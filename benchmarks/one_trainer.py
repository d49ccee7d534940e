"""One trainer for all: five kinds of distillation run through the same code, and each goes on exactly after a stop.

    python benchmarks/one_trainer.py [--check] [--quick] [--save]

A language model by its teacher's logits, a one-step generator of digits by DMD2 (three networks that take turns), an
image classifier of another architecture than its teacher's, a vision-language model, and a set of synthetic images.
Each recipe is run for a few steps without a break, and again from the checkpoint in the middle. The two students are
compared bit by bit, and so is everything else that the last checkpoints hold of networks and schedules.

--check exits 1 unless all are equal. The figure, on the last line, is the number of recipes whose runs are. --quick
runs two steps of each instead of eight. --save writes results/one_trainer.json here.
"""

import argparse
import contextlib
import io
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from machine import described
from safetensors.torch import load_file

from kdlm.recipe import load
from kdlm.train import train

ROOT = Path(__file__).resolve().parent.parent
RECIPES: dict[str, tuple[str, list[str]]] = {
    "logit_kd, code language model": (
        "quickstart.yaml",
        ["student.model=code-student-tiny", "teacher.model=code-teacher-tiny", "data.max_length=64"],
    ),
    "dmd2, digits": ("diffusion/digits_dmd2.yaml", []),
    "ofa_kd, ViT teaches CNN": (
        "vision/ofa_kd.yaml",
        [
            "student={name: image_classifier, config: {model_type: resnet, num_channels: 1, embedding_size: 8, "
            "hidden_sizes: [8, 16], depths: [1, 1], layer_type: basic, num_labels: 10}}",
            "method.stages=[resnet.encoder.stages.0, resnet.encoder.stages.1]",
        ],
    ),
    "llava_kd, small VLM": ("vision_language/finetune.yaml", ["student.path=sandbox:digits-vlm-student"]),
    "ftd, synthetic digits": ("dataset/ftd.yaml", []),
}


def measured(name: str, steps: int) -> dict[str, Any]:
    """Run a recipe unbroken and in two parts; return what was trained and what differs."""
    path, overrides = RECIPES[name]
    half = steps // 2
    short = {"max_steps": steps, "save_strategy": "steps", "save_steps": half, "eval_strategy": "no", "warmup_steps": 0}
    fixed = ["load_best_model_at_end=false", "logging_steps=1", "save_total_limit=null"]
    changes = [f"training.{key}={value}" for key, value in short.items()] + [f"training.{one}" for one in fixed]
    with tempfile.TemporaryDirectory() as folder:
        runs = {kind: Path(folder) / kind for kind in ("whole", "resumed")}
        recipes = {
            kind: load(ROOT / "recipes" / path, [*overrides, *changes, f"run_dir={run}"]) for kind, run in runs.items()
        }
        with contextlib.redirect_stdout(io.StringIO()) as said:
            train(recipes["whole"])
        with contextlib.redirect_stdout(io.StringIO()):
            train(recipes["resumed"], resume=str(runs["whole"] / f"checkpoint-{half}"))
        ends = {kind: tensors_of(run / f"checkpoint-{steps}") for kind, run in runs.items()}
        logged = (json.loads(line) for line in (runs["whole"] / "metrics.jsonl").read_text().splitlines())
        named = {key for line in logged if "loss" in line for key in line} - NO_TERMS
        terms = sorted(name for name in named if not name.startswith("grad_norm/")) or ["loss"]
    roles = [line.split(":")[0] for line in said.getvalue().splitlines() if ": moves in " in line] or ["student"]
    return {
        "method": recipes["whole"].method.name,
        "trained": roles,
        "terms": terms,
        "steps": steps,
        "tensors": len(ends["whole"]),
        "differing": differing(ends["whole"], ends["resumed"]),
    }


NO_TERMS = {"step", "loss", "epoch", "grad_norm", "learning_rate"} | {
    f"{unit}_per_second" for unit in ("tokens", "images", "samples")
}


def tensors_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Return every tensor of a checkpoint: of the student, the other networks, schedules and memories."""
    return {
        f"{file.relative_to(checkpoint)} {name}": tensor
        for file in sorted(checkpoint.rglob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def differing(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    """Return the names of tensors that are not bit for bit the same in both."""
    alone = one.keys() ^ other.keys()
    return sorted(alone | {name for name in one.keys() & other.keys() if not torch.equal(one[name], other[name])})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag in ("--check", "--quick", "--save"):
        parser.add_argument(flag, action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    table = {name: measured(name, 2 if args.quick else 8) for name in RECIPES}
    for name, row in table.items():
        same = "same" if not row["differing"] else f"{len(row['differing'])} of {row['tensors']} tensors differ"
        print(f"{name:<32}{', '.join(row['trained']):<36}{row['steps']} steps  resumed: {same}")
        print(f"{'':<32}terms: {', '.join(row['terms'])}")
    if args.save:
        text = json.dumps({"machine": described(), "recipes": table}, indent=1)
        (ROOT / "benchmarks" / "results" / "one_trainer.json").write_text(text + "\n", encoding="utf-8")
    exact = sum(not row["differing"] for row in table.values())
    print(f"{exact} of {len(table)} kinds of distillation end bit for bit as an unbroken run")
    return int(args.check and exact < len(table))


if __name__ == "__main__":
    sys.exit(main())
