"""Every method of kdlm: same student, data, steps and seeds within a group, one table a group.

    python benchmarks/leaderboard.py [--seeds 3] [--budget 1] [--only GROUP ...] [--quick] [--check]

The groups are comparisons of eval/leaderboard/, which `kdlm compare` runs one by one; this script runs all, and writes
results/leaderboard.md and leaderboard.json here. Stopped and started again with the same options, it goes on.

--budget multiplies the steps of every run. --only runs some groups, --quick 4 % of the steps of one seed; both leave
the results alone. The whole is about an hour of one core's time, --budget 4 is within three hours on two.
--check exits 1 unless every run ended, every method and loss of the unions is in a group or in LEFT_OUT, and the gates
of SURE hold: there, distillation has to win on every seed. The figure is the last line: methods ranked, and the share
of distilled students that beat their group's baseline in the mean.
"""

import argparse
import json
import re
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
GROUPS = {
    "text": "Language models, one tokenizer",
    "self": "Language models without a teacher",
    "tokenizers": "Language models, two tokenizers",
    "bytes": "Language models, a student of bytes",
    "transfer": "Another tokenizer for the same model",
    "images": "Image classifiers, few labels",
    "maps": "Image classifiers, attention",
    "teacherless": "Image classifiers without a teacher",
    "dual_encoders": "Dual encoders of images and text",
    "masked_autoencoders": "Masked autoencoders",
    "vision_language": "Vision-language models",
    "diffusion": "Diffusion, one step",
    "dataset": "Dataset distillation",
}
LEFT_OUT = {
    "step_by_step": "wants rows of two tasks, which no group has",
    "self_distillation": "tells the teacher what the groups' data do not hold: self_distillation_quality.py",
    "grpo": "learns from rewards of its own completions, in TRL's trainer, and not from the groups' figures",
    "dpo": "learns from right and wrong answers to a prompt, which no group has, in TRL's trainer",
    "simpo": "learns from right and wrong answers to a prompt, which no group has, in TRL's trainer",
    "redi": "learns from right and wrong answers to a prompt, which no group has: data_quality.py",
    "rlad": "learns from rewards of its own completions, in TRL's trainer, and not from the groups' figures",
    "policy_gradient": "learns from rewards, which no group has",
    "rltf_sd": "learns from rewards and feedback, which no group has",
    "rltf_fm": "learns from rewards and feedback, which no group has",
    "score": "learns from rewards of two attempts, which no group has",
    "pi_distill": "learns from rewards, which no group has",
    "gdsd": "learns from rewards, which no group has: its recipe, recipes/sandbox/gdsd.yaml, has one that is counted",
    "masked_kd": "is for masked language models, whose bound no group measures: tests/trainer has it against the data",
    "minilm": "trains no head by itself, and with losses is two methods at once: encoder_distillation.py",
    "tinybert": "compares heads, of which the text group's pair has not as many: encoder_distillation.py",
    "class_kd": "is for classifiers of texts, which no group has: recipes/sandbox/text_classification.yaml has one",
    "sdpo": "learns from what a verifier says of its own attempts, and no group has one",
    "sd_zero_revision": "learns from what a verifier says of its own attempts, and no group has one",
    "sd_zero": "learns from what a verifier says of its own attempts, and no group has one",
    "unisd": "reads contexts that the rows of no group have",
    "layer_matching": "learns by a loss beside it, in students with replaced layers: replaced_modules.py",
    "acm": "trains students that compute as much as a token needs, in three stages: adaptive_students.py",
    "custom": "is the user's own",
    "cfg_distillation": "makes a guided teacher cheaper, and is measured by its distance to that: vision_diffusion.py",
    "curio_sft": "holds a model that is fine-tuned near what it was, and the students here begin from nothing",
    "skill_sd": "learns from rewards of episodes, which no group has: recipes/sandbox/tools/skill_sd.yaml counts them",
    "squarehead": "wants a student of the teacher's own shape, with fewer weights: sparse_student.py",
    "further_pretraining": "prepares for fine-tuning, which a ranking by the text it is trained on does not show",
}
"""Method or loss -> why it is in no group."""
SURE = (("text", "forward_kl"), ("images", "image_kd"), ("diffusion", "dmd"))
"""Groups and runs that have to beat the baseline on every seed."""
QUICK = 0.04
STEPS = re.compile(r"(training\.max_steps|method\.phase_steps|method\.generation_steps|method\.warmup)=(\d+)")


def comparison(group: str, args: argparse.Namespace) -> Any:
    """Read a group, with the seeds and steps that were asked for."""
    from kdlm.compare import Comparison
    from kdlm.section_loader import load_section

    read = load_section(Comparison, ROOT / "eval" / "leaderboard" / f"{group}.yaml")
    runs = {
        name: run.model_copy(update={"recipe": ROOT / run.recipe, "overrides": scaled(run.overrides, args)})
        for name, run in read.runs.items()
    }
    changed = {"runs": runs, "overrides": scaled(read.overrides, args), "seeds": list(range(args.seeds))}
    return read.model_copy(update=changed | {"workers": args.workers, "threads": 1, "output": args.folder / group})


def scaled(overrides: list[str], args: argparse.Namespace) -> list[str]:
    """Return overrides with their numbers of steps multiplied by the budget; a run of one step stays one."""

    def times(found: re.Match[str]) -> str:
        steps = int(found[2])
        return found[0] if steps == 1 else f"{found[1]}={max(1, round(steps * args.budget))}"

    return [STEPS.sub(times, override) for override in overrides]


def used(runs: list[Any]) -> set[str]:
    """Return the names of the methods and losses that some runs train with."""
    methods = {run.recipe.method.name for run in runs}
    return methods | {loss.name for run in runs for loss in run.recipe.losses}


def missing(planned: dict[str, list[Any]]) -> list[str]:
    """Return a line for each method or loss of the unions that no group has, and for each that is left out in vain."""
    from kdlm.catalogue import members, name_of
    from kdlm.losses import AnyLoss
    from kdlm.methods import AnyMethod

    there = {name for runs in planned.values() for name in used(runs)}
    union = {name_of(section) for kind in (AnyMethod, AnyLoss) for section in members(kind)}
    lines = [
        f"{name}: in no group of eval/leaderboard, nor in LEFT_OUT" for name in sorted(union - there - {*LEFT_OUT})
    ]
    return lines + [f"{name}: in LEFT_OUT, and there is no such method or loss" for name in sorted({*LEFT_OUT} - union)]


def papers() -> dict[str, str]:
    """Return method or loss -> its paper."""
    from kdlm.catalogue import entries

    return {entry.name: entry.paper for entry in entries() if entry.kind in ("method", "loss")}


def beaten(rows: list[Any], compared: Any) -> dict[str, tuple[bool, bool, bool]]:
    """Return for each run but the baseline whether it is better in the mean, on every seed, and with p below 0.05."""
    from kdlm.estimates import SIGNIFICANT

    metric, way = next(iter(compared.metrics.items()))
    sign = 1 if way == "higher" else -1
    base = next(row for row in rows if row.name == compared.baseline)
    found = {}
    for row in rows:
        if row is base or not row.figures:
            continue
        beyond, seeds = row.beyond(base, metric), row.figures.keys() & base.figures.keys()
        wins = [sign * (row.figures[seed][metric] - base.figures[seed][metric]) > 0 for seed in seeds]
        better = sign * beyond.value > 0
        found[row.name] = better, bool(wins) and all(wins), better and beyond.p_value < SIGNIFICANT
    return found


def table_of(group: str, rows: list[Any], compared: Any, runs: list[Any], cited: dict[str, str]) -> str:
    """Return the heading, the words and the table of a group."""
    from kdlm.compare.table import cells
    from kdlm.markdown import table

    text = (ROOT / "eval" / "leaderboard" / f"{group}.yaml").read_text()
    about = " ".join(line.removeprefix("# ") for line in text.splitlines()[1:] if line.startswith("# "))
    head, body = cells(rows, compared)
    first = {run.name: run.recipe for run in runs}

    def paper(name: str) -> str:
        recipe = first[name]
        loss = recipe.method.name in ("logit_kd", "image_kd") and recipe.losses
        return (
            cited.get(recipe.losses[-1].name if loss else recipe.method.name, "") if name != compared.baseline else ""
        )

    lines = [[rank, name, paper(name), *rest] for rank, name, *rest in body]
    rows = table([head[0], "method", "paper", *head[2:]], lines)
    ways = ", ".join(f"`{metric}` {way}" for metric, way in compared.metrics.items())
    steps = max(run.recipe.training.max_steps for run in runs)
    steps = f"{steps} optimiser steps" if steps > 0 else f"{runs[0].recipe.training.num_train_epochs} epochs"
    return f"## {GROUPS[group]}\n\n{about}\n\n{steps}. Better: {ways}; ranked by the first.\n\n{rows}\n"


HEAD = """# Leaderboard

Made by `python benchmarks/leaderboard.py`: every method of kdlm, in groups that share student, teacher, data, steps and
seeds ([how a comparison works](../../docs/comparing.md)). {runs} runs, {seeds} seeds each, took {minutes:.0f} minutes
of a core ({cpu}), one thread each.

**What it says.** Within a group, at this budget and with these settings, which objective leaves the better student.
Means ± half of the 95 % interval over seeds (Student's t); the difference is to the group's baseline, seed by seed,
with the p-value of the paired t-test, which is not corrected for the number of rows. With few seeds p is rough: a gap
that is the same on every seed may still miss 0.05.

**What it does not say.** The models are tiny and the runs short: from random weights, far from converged. Settings are
those of the recipes and were not tuned for the table, and one learning rate serves a group. Equal steps are not equal
time: see the last columns, and methods that train on the student's own text pay for writing it. Methods that need a
student who can already write, as the policy gradients do, start here from one who cannot. Seconds are of a whole run,
start and evaluation with it; those of the wall say little where the machine had other work, those of the CPU more.
"""


def written(done: dict[str, tuple[Any, list[Any], list[Any]]]) -> None:
    """Write the tables, and their figures with the machine."""
    from machine import described

    from kdlm.compare.table import as_data

    machine, cited = described(), papers()
    first = next(iter(done.values()))[0]
    total = sum(len(runs) for _, _, runs in done.values())
    clocks = [seconds["cpu"] for _, rows, _ in done.values() for row in rows for seconds in row.seconds.values()]
    minutes = sum(one for one in clocks if one == one) / 60
    head = HEAD.format(runs=total, seeds=len(first.seeds), minutes=minutes, **machine)
    left = "\n".join(f"- `{name}` {why}" for name, why in LEFT_OUT.items())
    tables = [table_of(group, rows, compared, runs, cited) for group, (compared, rows, runs) in done.items()]
    results = ROOT / "benchmarks" / "results"
    (results / "leaderboard.md").write_text("\n".join([head, *tables, f"## Left out\n\n{left}\n"]), encoding="utf-8")
    groups = {group: as_data(rows, compared)["runs"] for group, (compared, rows, _) in done.items()}
    data = {"machine": machine, "core_minutes": minutes, "seeds": first.seeds, "groups": groups}
    (results / "leaderboard.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag in ("--check", "--quick"):
        parser.add_argument(flag, action="store_true")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--budget", type=float, default=1.0, help="factor on the steps of every run")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--only", nargs="+", choices=list(GROUPS), default=list(GROUPS), metavar="GROUP")
    parser.add_argument("--folder", type=Path, default=None, help="where the runs go (default: runs/leaderboard)")
    args = parser.parse_args()
    if args.quick:
        args.seeds, args.budget = 1, QUICK
    args.folder = args.folder or ROOT / "runs" / ("leaderboard-quick" if args.quick else "leaderboard")
    return args


def main() -> int:
    args = arguments()
    from kdlm.compare import compare
    from kdlm.compare.planned import planned

    began = time.perf_counter()
    groups = {group: comparison(group, args) for group in args.only}
    runs = {group: planned(compared) for group, compared in groups.items()}
    whole = len(args.only) == len(GROUPS)
    wrong = missing(runs) if whole else []
    done: dict[str, tuple[Any, list[Any], list[Any]]] = {}
    better: dict[str, dict[str, tuple[bool, bool, bool]]] = {}
    for group, compared in groups.items():
        print(f"\n{GROUPS[group]}", flush=True)
        rows = compare(compared)
        done[group], better[group] = (compared, rows, runs[group]), beaten(rows, compared)
        wrong += [f"{group}: {row.name} failed" for row in rows if row.failed]
    if not args.quick:
        sure = [(group, name) for group, name in SURE if group in better]
        wrong += [
            f"{g}: {n} does not beat the baseline on every seed" for g, n in sure if not better[g].get(n, (0, 0))[1]
        ]
    minutes = (time.perf_counter() - began) / 60
    if whole and not args.quick:
        written(done)
    verdicts = [found for group in better.values() for found in group.values()]
    ranked = {name for group in done.values() for name in used(group[2])}
    print("\n".join(wrong) or "every gate holds", f"{minutes:.1f} minutes", sep="\n")
    print(
        f"{len(ranked - {*LEFT_OUT})} methods and losses in {len(done)} groups; {sum(v[0] for v in verdicts)} of "
        f"{len(verdicts)} distilled students beat their baseline, {sum(v[2] for v in verdicts)} of them with p < 0.05"
    )
    return int(args.check and bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
