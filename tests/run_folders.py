"""Run folders and inspections written by hand, for the tests of the report."""

import json
from pathlib import Path
from typing import Any

import yaml

RECIPE = {
    "student": {"name": "sandbox", "model": "code-student"},
    "teacher": {"name": "sandbox", "model": "code-teacher"},
    "data": {"name": "text", "train": [{"path": "sandbox:code/train"}], "eval": [{"path": "sandbox:code/eval"}]},
    "method": {"name": "logit_kd"},
    "losses": [{"name": "forward_kl", "weight": 1.0}],
    "training": {"max_steps": 40, "learning_rate": 0.002},
    "run_dir": "runs/kl",
    "seed": 0,
}
BASELINE = {"method": {"name": "sequence_kd"}, "losses": [{"name": "cross_entropy", "weight": 1.0}]}
SOURCE = {
    "source": "sandbox:code/train",
    "form": "text",
    "rows": 25,
    "kept": 23,
    "sequences": 80,
    "tokens": 10_000,
    "trained_tokens": 9_900,
    "truncated": 1,
    "split": 0,
    "unused": {"empty text": {"count": 2, "examples": ["train.jsonl:3", "train.jsonl:9"]}},
}
TEACHER = 2.0


def lines(end: float = 2.5, name: str = "forward_kl") -> list[dict[str, Any]]:
    """Return a log of 40 steps: training every 10, evaluation every 20 from the start, losses that fall to `end`."""
    made: list[dict[str, Any]] = []
    for step in range(0, 41, 10):
        loss = end + 2 * (1 - step / 40)
        if step:
            training = {"loss": loss, "grad_norm": 1.0, "learning_rate": 1e-3, "tokens_per_second": 900.0 + step}
            made.append({"step": step, **training, "memory_gib": 0.5, name: loss, "epoch": step / 80})
        if step % 20 == 0:
            held_out = {"eval_loss": loss, "eval_cross_entropy": loss, "eval_teacher_cross_entropy": TEACHER}
            held_out |= {"eval_kl_to_teacher": loss - TEACHER, "eval_top1_agreement": 0.1 + step / 100}
            made.append({"step": step, **held_out, "eval_runtime": 1.0, "epoch": step / 80})
    return [*made, {"step": 40, "train_runtime": 61.0, "epoch": 0.5}]


def write_run(folder: Path, log: list[dict[str, Any]] | None = None, **recipe: Any) -> Path:
    """Write a finished run with this log (None: `lines()`) and these changes to the recipe, and return the folder."""
    log = lines() if log is None else log
    folder.mkdir(parents=True, exist_ok=True)
    whole = RECIPE | {"run_dir": f"runs/{folder.name}"} | recipe
    (folder / "recipe.yaml").write_text(yaml.safe_dump(whole, sort_keys=False, allow_unicode=True))
    environment = {"python": "3.11.7", "packages": {"torch": "2.13.0"}, "devices": ["cpu"], "processes": 1}
    (folder / "environment.json").write_text(json.dumps(environment))
    held_out = SOURCE | {"source": "sandbox:code/eval", "unused": {}}
    data = {"fingerprints": {"train": "a", "eval": "b"}, "train": [SOURCE], "eval": [held_out], "notes": []}
    (folder / "data.json").write_text(json.dumps(data))
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in log))
    last = next((line for line in reversed(log) if any(key.startswith("eval_") for key in line)), {})
    results = {"steps": 40, "train_runtime": 61.0, **{key: last[key] for key in last if key.startswith("eval_")}}
    (folder / "results.json").write_text(json.dumps(results))
    return folder


def token(text: str, kl: float, *, kept: bool = True) -> dict[str, Any]:
    """Return one token of an inspection."""
    if not kept:
        return {"text": text, "kept": False}
    return {
        "text": text,
        "kept": True,
        "cross_entropy": 1 + kl,
        "kl_to_teacher": kl,
        "reverse_kl_to_teacher": kl / 2,
        "teacher": [[text, 0.5], [" other", 0.25]],
        "student": [[" other", 0.4], [text, 0.3]],
    }


def inspection(texts: int = 2, tokens: int = 40, words: tuple[str, ...] = ("def", " f", "(x):\n", "    return")) -> Any:
    """Return an inspection whose numbers are all different, of student and teacher."""
    written = [
        {
            "place": f"eval.jsonl:{number + 1}",
            "tokens": [
                token(words[at % len(words)], 0.01 * (at + 1) * (number + 1), kept=at > 0) for at in range(tokens)
            ],
        }
        for number in range(texts)
    ]
    bins = {
        "confidence": [None if at == 3 else (at + 0.5) / 15 for at in range(15)],
        "accuracy": [None if at == 3 else (at + 0.2) / 15 for at in range(15)],
        "count": [0 if at == 3 else 100 * (15 - at) for at in range(15)],
    }
    kls = [token["kl_to_teacher"] for text in written for token in text["tokens"] if token["kept"]]
    metrics = {"kl_to_teacher": {"value": sum(kls) / len(kls), "error": 0.1}}
    measured = {"tokens": len(kls), "documents": texts, "metrics": metrics}
    return {
        "student": "code-student",
        "teacher": "code-teacher",
        "texts": written,
        "measured": measured | {"reliability": {"student": bins, "teacher": bins}},
    }


def write_inspected(folder: Path, **recipe: Any) -> Path:
    """Write a finished run that was inspected."""
    write_run(folder, **recipe)
    (folder / "inspection.json").write_text(json.dumps(inspection()))
    return folder
