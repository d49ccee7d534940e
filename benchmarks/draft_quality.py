"""Drafts for speculative decoding: does training on the target raise block efficiency by a fifth?

    python benchmarks/draft_quality.py [--check] [--quick] [--save]

A draft is trained by cross-entropy until its held-out loss no longer falls (recipes/sandbox/draft/pretrain.yaml): the
cross-entropy-trained self. From there each arm takes the same number of further steps of the same batch and learning
rate:

    further cross-entropy               the control: the same text again
    own text, tvd, forward_kl, ...      DistillSpec, arXiv 2310.08461 (distillspec.yaml)
    target's text, tvd, tvd_plus_plus   direct alignment, arXiv 2403.00858, stages 2 and 3 (align.yaml)

One more draft asks whether better text would have done instead: cross-entropy on the target's own training text, for as
many steps as an arm takes in all.

Every draft then decodes held-out prompts with the target by real speculative sampling at temperature 1, five tokens a
block. Block efficiency is tokens a pass of the target; errors are a jackknife over prompts. Wall-clock is reported and
not gated: models this small spend their time in the loop around them.

--check exits 1 unless the best arm on the draft's own text has 1.2 times the block efficiency of the
cross-entropy-trained self, and more than the other two drafts of cross-entropy. --quick takes the tiny pair and few
steps: a smoke test, whose figures mean nothing and which gates nothing. --save writes
benchmarks/results/draft_quality.json.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
RECIPES = ROOT / "recipes" / "sandbox" / "draft"
GATE, DRAFTED, TEMPERATURE = 1.20, 5, 1.0
SELF, CONTROL, ALL = "cross-entropy", "further cross-entropy", "cross-entropy, the target's data"
OWN, GIVEN = "own text", "target's text"


class Sizes(NamedTuple):
    """Who is trained, for how long, and how much is decoded."""

    target: str
    draft: str
    pretraining: int
    steps: int
    prompts: int
    new_tokens: int


WHOLE = Sizes("code-teacher", "code-student", 800, 150, 32, 64)
QUICK = Sizes("code-teacher-tiny", "code-student-tiny", 20, 4, 4, 16)


def trained(recipe: str, folder: Path, sizes: Sizes, start: Path | None, *changes: str) -> dict[str, Any]:
    """Train one draft, on from the folder `start` where there is one, and return where it is and how it went."""
    from kdlm.recipe import load
    from kdlm.train import train

    shared = [f"run_dir={folder}", "training.use_cpu=true", "data.eval.0.limit=6"]
    if start is None:
        shared += [f"student.model={sizes.draft}", f"training.max_steps={sizes.pretraining}"]
    else:
        shared += [f"student={{name: pretrained, path: '{start}'}}", f"training.max_steps={sizes.steps}"]
        shared += ["training.learning_rate=2.0e-3", "training.warmup_steps=15", "training.eval_strategy='no'"]
    if recipe != "pretrain":
        shared.append(f"teacher.model={sizes.target}")
    began = cpu_seconds()
    train(load(RECIPES / f"{recipe}.yaml", [*shared, *changes]))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        "folder": folder / "student",
        "held_out_loss": json.loads((folder / "results.json").read_text())["eval_cross_entropy"],
        "held_out_curve": [
            (line["step"], line["eval_cross_entropy"]) for line in lines if "eval_cross_entropy" in line
        ],
        "training_cpu_seconds": cpu_seconds() - began,
    }


def cpu_seconds() -> float:
    """Return what this process and those it waited for have used: a busy machine leaves it nearly alone."""
    return sum(os.times()[:4])


def answers(sizes: Sizes, out: Path) -> str:
    """Have the target answer the beginnings of the training text; return what the example says of it."""
    script = [sys.executable, str(ROOT / "examples" / "target_answers.py"), "--target", f"sandbox:{sizes.target}"]
    given = ["--prompts", "sandbox:code/train", "--max-length", "128", "--out", str(out)]
    done = subprocess.run([*script, *given], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"target_answers.py ended with {done.returncode}\n{done.stderr[-3000:]}")
    return done.stdout.strip().partition(": ")[2]


def arms(folder: Path, sizes: Sizes) -> Iterator[tuple[str, dict[str, Any]]]:
    """Train the draft that the others start from, and then each of them."""
    first = trained("pretrain", folder / "self", sizes, None)
    start = first["folder"]
    yield SELF, first
    yield CONTROL, trained("pretrain", folder / "control", sizes, start)
    longer = f"training.max_steps={sizes.pretraining + sizes.steps}"
    yield ALL, trained("pretrain", folder / "all", sizes, None, "data.train.0.path=sandbox:code/teacher", longer)
    for loss in ("tvd", "forward_kl", "jsd", "reverse_kl"):
        change = f"losses=[{{name: {loss}}}]"
        yield f"{OWN}, {loss}", trained("distillspec", folder / f"own-{loss}", sizes, start, change)
    text = folder / "answers.jsonl"
    print(f"{GIVEN}: {answers(sizes, text)}")
    given = f"data.train.0.path={text}"
    for loss in ("tvd", "tvd_plus_plus"):
        change = f"losses=[{{name: {loss}}}]"
        yield f"{GIVEN}, {loss}", trained("align", folder / f"given-{loss}", sizes, start, given, change)


def held_out_prompts(sizes: Sizes) -> list[list[int]]:
    """Return the first 32 tokens of pieces of held-out text, spread evenly over it."""
    from kdlm.data import DataSection, Source, load_data
    from kdlm.models import named

    tokenizer = named(f"sandbox:{sizes.target}").tokenizer()
    rows: Any = load_data(DataSection(train=[Source(path="sandbox:code/eval")], max_length=128), tokenizer).train
    return [list(rows[number * len(rows) // sizes.prompts]["input_ids"][:32]) for number in range(sizes.prompts)]


def decoded(draft: dict[str, Any], target: Any, prompts: list[list[int]], sizes: Sizes) -> dict[str, Any]:
    """Add what real speculative decoding says of a draft."""
    from transformers import AutoModelForCausalLM

    from kdlm.speculation import measure

    asked = {"drafted": DRAFTED, "temperature": TEMPERATURE, "max_new_tokens": sizes.new_tokens}
    report = measure(target, AutoModelForCausalLM.from_pretrained(draft.pop("folder")), prompts, **asked).to_dict()
    kept = ("block_efficiency", "acceptance", "speedup", "expected_speedup", "cost_ratio", "target_passes", "emitted")
    return draft | {name: report[name] for name in kept}


def run(sizes: Sizes, folder: Path) -> dict[str, dict[str, Any]]:
    """Train and measure all drafts; return what was found of each, by name."""
    from kdlm.models import named

    target, prompts = named(f"sandbox:{sizes.target}").load(), held_out_prompts(sizes)
    found: dict[str, dict[str, Any]] = {}
    for name, draft in arms(folder, sizes):
        found[name] = decoded(draft, target, prompts, sizes)
        found[name]["gain"] = found[name]["block_efficiency"]["value"] / found[SELF]["block_efficiency"]["value"]
        print(row(name, found[name]), flush=True)
    return found


def row(name: str, draft: dict[str, Any]) -> str:
    """Return a draft as a line of a table."""
    figures = {what: draft[what] for what in ("block_efficiency", "acceptance", "speedup")}
    cells = [f"{each['value']:.3f} ± {each['error']:.3f}" for each in figures.values()]
    return f"| {name} | {draft['held_out_loss']:.3f} | {' | '.join(cells)} | {draft['gain'] - 1:+.0%} |"


def verdict(drafts: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the best arm on the draft's own text, which arms reach the gate, and whether it is met."""
    own = [name for name in drafts if name.startswith(OWN)]
    best = max(own, key=lambda name: drafts[name]["gain"])
    untaught = max(drafts[CONTROL]["gain"], drafts[ALL]["gain"])
    passing = [name for name, draft in drafts.items() if draft["gain"] >= GATE and draft["gain"] > untaught]
    return {"best": best, "gain": drafts[best]["gain"], "passing": passing, "met": best in passing}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="exit 1 if the gate is missed")
    parser.add_argument("--quick", action="store_true", help="the tiny pair and few steps: a smoke test")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/draft_quality.json")
    args = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    sizes = QUICK if args.quick else WHOLE
    with tempfile.TemporaryDirectory() as folder:
        drafts = run(sizes, Path(folder))
    found = verdict(drafts)
    if args.save:
        from machine import described

        settings = {**sizes._asdict(), "drafted": DRAFTED, "temperature": TEMPERATURE}
        about = {"machine": described(), "settings": settings, "cpu_seconds": cpu_seconds()}
        path = ROOT / "benchmarks" / "results" / "draft_quality.json"
        path.write_text(json.dumps({**about, **found, "drafts": drafts}, indent=1) + "\n")
    print(f"{cpu_seconds():.0f} s of one core")
    passing = "; ".join(found["passing"]) or "none"
    print(f"at least {GATE - 1:.0%} over {SELF!r}, and over all drafts of cross-entropy: {passing}")
    print(f"block efficiency of the best arm on its own text ({found['best']}): {found['gain'] - 1:+.1%}")
    return 1 if args.check and not args.quick and not found["met"] else 0


if __name__ == "__main__":
    sys.exit(main())
