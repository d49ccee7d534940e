"""Data in training: do DDK's shares follow a planted gap, do merged models rank mixtures, does RS2 beat a fixed part?

    python benchmarks/data_mixing.py [--check] [--quick] [--save] [--only ddk,demix,rs2]

All on the sandbox's tiny models (0.1 M parameters, 512 ids) and three of its domains: code, arithmetic, strings.

ddk: a teacher has learned all three, a student all but strings. Then DDK trains the student. The share of strings has
to be the largest at first, and to fall back as the gap closes.
demix: from one start, a component is trained on each domain, and a model on each of eight planted mixtures for as many
steps. Both ways of scoring a mixture, by the average of the components and by the model that was trained on it, are
compared by Spearman's rank correlation. They are judged on arithmetic and strings: code is there to distract. Every
mixture is trained on twice, on other data the second time: how well these two rankings agree says whether there is a
ranking to be found. Then `kdlm mix` looks for weights, and they are trained on too. All on three seeds.
rs2: a tenth of 200 worked sums, drawn anew every epoch or once, at equal updates, seed by seed, without a teacher.

--check exits 1 unless the share of strings is the largest at first, has fallen back by at least half of what it was
above a third, and its gap has shrunk; the rank correlation is at least 0.8 on every seed; and RS2's held-out
cross-entropy is below that of the fixed part on every seed. --quick takes few steps and gates nothing but that all
parts run. --save writes benchmarks/results/data_mixing.json.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import spearmanr

ROOT = Path(__file__).resolve().parent.parent
RECIPES = ROOT / "recipes" / "sandbox"
RANKED = 0.8
DOMAINS = ("code", "arithmetic", "strings")
MIXTURES = (
    (0.80, 0.10, 0.10),
    (0.10, 0.80, 0.10),
    (0.10, 0.10, 0.80),
    (0.34, 0.33, 0.33),
    (0.50, 0.40, 0.10),
    (0.10, 0.50, 0.40),
    (0.45, 0.10, 0.45),
    (0.20, 0.60, 0.20),
)
PLAIN = (
    "training.eval_strategy='no'",
    "training.save_strategy='no'",
    "training.warmup_steps=10",
    "training.use_cpu=true",
)
TINY = "{name: sandbox, model: code-teacher-tiny}"
BATCH = 8


class Sizes(NamedTuple):
    """Settings of each part, as they are written beside its figures."""

    ddk: dict[str, Any]
    demix: dict[str, Any]
    rs2: dict[str, Any]


WHOLE = Sizes(
    ddk={"teacher": 500, "student": 250, "steps": 300, "every": 20, "rows": 1000},
    demix={"start": 1200, "steps": 100, "batch": 16, "rows": 4000, "judged": 200, "evaluations": 8, "seeds": [0, 1, 2]},
    rs2={"steps": 150, "rows": 200, "seeds": [0, 1, 2]},
)
QUICK = Sizes(
    ddk={"teacher": 8, "student": 4, "steps": 8, "every": 4, "rows": 60},
    demix={"start": 4, "steps": 3, "batch": 8, "rows": 60, "judged": 10, "evaluations": 4, "seeds": [1]},
    rs2={"steps": 4, "rows": 12, "seeds": [0]},
)


def source(domain: str, rows: int, **more: Any) -> str:
    limit = max(2, rows // 50) if domain == "code" else rows  # a row of code is a file, of some 20 sequences
    return json.dumps({"path": f"sandbox:{domain}/train", "domain": domain, "limit": limit, **more})


def trained(recipe: str, folder: Path, *changes: str) -> Path:
    """Run a recipe of the sandbox with changes and return its folder."""
    from kdlm.recipe import load
    from kdlm.train import train

    return train(load(RECIPES / recipe, [*PLAIN, f"run_dir={folder}", *changes]))


def figures(run: Path) -> dict[str, Any]:
    return json.loads((run / "results.json").read_text())


def followed(sizes: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Plant a gap in one domain and return the shares and gaps of all, measurement by measurement."""
    every = [source(domain, sizes["rows"], weight=1) for domain in DOMAINS]
    begin = ["training.lr_scheduler_type=cosine", f"student={TINY}"]
    steps = "training.max_steps"
    teacher = trained(
        "demix/start.yaml", folder / "teacher", *begin, f"data.train=[{','.join(every)}]", f"{steps}={sizes['teacher']}"
    )
    student = trained(
        "demix/start.yaml",
        folder / "student",
        *begin,
        f"data.train=[{','.join(every[:2])}]",
        f"{steps}={sizes['student']}",
    )
    run = trained(
        "ddk.yaml",
        folder / "ddk",
        f"student={{name: pretrained, path: {student / 'student'}}}",
        f"teacher={{name: local, path: {teacher / 'student'}}}",
        f"data.train=[{','.join(source(domain, sizes['rows']) for domain in DOMAINS)}]",
        f"sampler={{name: ddk, every: {sizes['every']}, held_out: {min(50, sizes['rows'] // 6)}}}",
        f"{steps}={sizes['steps']}",
        "data.eval.0.limit=1",
        "training.lr_scheduler_type=constant",
        "training.learning_rate=2e-3",
    )
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "share/code" in line]
    told = {
        what: {domain: [line[f"{what}/{domain}"] for line in lines] for domain in DOMAINS} for what in ("share", "gap")
    }
    last = {what: {domain: lines[-1][f"{what}/{domain}"] for domain in DOMAINS} for what in ("samples", "passes")}
    return {"steps": [line["step"] for line in lines], **told, **last}


def ranked(sizes: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Score eight mixtures by merged components and by models that were trained on them, seed by seed."""
    seeds = []
    for seed in sizes["seeds"]:
        seeds.append(scored(sizes, seed, folder / str(seed)))
        print(json.dumps(seeds[-1]), flush=True)
    each = {name: [one[name] for one in seeds] for name in ("spearman", "again")}
    return {"mixtures": MIXTURES, "seeds": seeds, **each}


def scored(sizes: dict[str, Any], seed: int, folder: Path) -> dict[str, Any]:
    """Return both scores of each mixture, and of what `kdlm mix` finds, all from one start.

    The start is good, and the rate of components and real runs is low and falls to 0. So a step does nearly the same
    wherever it is taken, and no model carries the noise of its last steps, which an average would have less of.
    """
    import yaml

    from kdlm.mix import Mixture, mix
    from kdlm.mix.components import Proxies, whole
    from kdlm.section_loader import load_section

    begin = trained(
        "demix/start.yaml",
        folder / "start",
        f"student={TINY}",
        f"data.train=[{','.join(source(domain, sizes['rows'], weight=1) for domain in DOMAINS)}]",
        "data.stopping_strategy=all_exhausted",
        f"training.max_steps={sizes['start']}",
        "training.lr_scheduler_type=cosine",
        f"seed={seed}",
    )
    judges = [json.dumps({"path": f"sandbox:{domain}/eval", "limit": sizes["judged"]}) for domain in DOMAINS[1:]]
    changes = [
        *PLAIN,
        f"student={{name: pretrained, path: {begin / 'student'}}}",
        f"data.train=[{','.join(source(domain, sizes['rows']) for domain in DOMAINS)}]",
        "data.stopping_strategy=all_exhausted",
        f"training.max_steps={sizes['steps']}",
        f"training.per_device_train_batch_size={sizes['batch']}",
        "training.learning_rate=3e-4",
        "training.lr_scheduler_type=linear",
        f"data.eval=[{','.join(judges)}]",
    ]
    given = {"recipe": str(RECIPES / "demix" / "run.yaml"), "overrides": changes, "workers": 1, "threads": 1}
    given |= {"evaluations": sizes["evaluations"], "seed": seed, "output": str(folder / "mixture")}
    (folder / "mixture.yaml").write_text(yaml.safe_dump(given))
    mixture = load_section(Mixture, folder / "mixture.yaml")
    found = [*mix(mixture).values()]
    folders = [folder / "mixture" / "components" / f"{domain}-{seed}" / "student" for domain in DOMAINS]
    proxies = Proxies(mixture, whole(mixture), folders)
    merged = [proxies.score(np.array(weights)) for weights in (*MIXTURES, found)]
    proxies.close()

    def real(weights: Any, seed: int, name: str) -> float:
        train = ",".join(source(d, sizes["rows"], weight=w) for d, w in zip(DOMAINS, weights, strict=True))
        run = trained("demix/run.yaml", folder / name, *changes, f"data.train=[{train}]", f"seed={seed}")
        return figures(run)["eval_cross_entropy"]

    first = [real(weights, seed, f"real-{place}") for place, weights in enumerate((*MIXTURES, found))]
    second = [real(weights, seed + 1000, f"again-{place}") for place, weights in enumerate(MIXTURES)]
    return {
        "seed": seed,
        "merged": merged[:-1],
        "trained": first[:-1],
        "trained_again": second,
        "spearman": float(spearmanr(merged[:-1], first[:-1]).statistic),
        "again": float(spearmanr(first[:-1], second).statistic),
        "found": {"weights": found, "merged": merged[-1], "trained": first[-1]},
    }


def repeated(sizes: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Train on a fresh tenth each epoch and on one tenth, for as many updates; one value a seed."""
    ways = {
        "rs2": "sampler={name: repeated, fraction: 0.1}",
        "fixed": "sampler={name: fixed, fraction: 0.1}",
    }
    found: dict[str, Any] = {name: [] for name in ways}
    for seed in sizes["seeds"]:
        for name, sampler in ways.items():
            run = trained(
                "demix/run.yaml",
                folder / f"{name}-{seed}",
                f"student={{name: fresh, config_from: 'sandbox:code-student-tiny', seed: {seed}}}",
                f"data.train=[{source('arithmetic', sizes['rows'])}]",
                'data.eval=[{path: "sandbox:arithmetic/eval", limit: 100}]',
                "training.learning_rate=3e-3",
                sampler.replace("fixed,", f"fixed, seed: {seed},"),
                f"training.max_steps={sizes['steps']}",
                f"seed={seed}",
            )
            found[name].append(figures(run)["eval_cross_entropy"])
    return found


def verdict(found: dict[str, Any]) -> dict[str, bool]:
    """Return which gates are met."""
    met = {}
    if "ddk" in found:
        share, gap = found["ddk"]["share"], found["ddk"]["gap"]
        first = {domain: values[0] for domain, values in share.items()}
        back = share["strings"][-1] - 1 / 3 <= (share["strings"][0] - 1 / 3) / 2
        met["ddk"] = max(first, key=first.__getitem__) == "strings" and back and gap["strings"][-1] < gap["strings"][0]
    if "demix" in found:
        met["demix"] = min(found["demix"]["spearman"]) >= RANKED
    if "rs2" in found:
        met["rs2"] = all(ours < fixed for ours, fixed in zip(found["rs2"]["rs2"], found["rs2"]["fixed"], strict=True))
    return met


def told(found: dict[str, Any]) -> str:
    """Return the figures in one line."""
    parts = []
    if "ddk" in found:
        share, gap = (found["ddk"][what]["strings"] for what in ("share", "gap"))
        parts.append(
            f"DDK's share of the planted gap {share[0]:.2f} -> {share[-1]:.2f} (gap {gap[0]:.2f} -> {gap[-1]:.2f})"
        )
    if "demix" in found:
        each, again = (", ".join(f"{one:.2f}" for one in found["demix"][name]) for name in ("spearman", "again"))
        parts.append(
            f"DeMix ranks 8 mixtures by Spearman {fmean(found['demix']['spearman']):.2f} (seeds {each}; real training "
            f"again {again}; gate {RANKED})"
        )
    if "rs2" in found:
        means = {name: fmean(found["rs2"][name]) for name in ("rs2", "fixed")}
        parts.append(f"cross-entropy of RS2 {means['rs2']:.3f}, a fixed tenth {means['fixed']:.3f}")
    return "; ".join(parts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="exit 1 if a gate is missed")
    parser.add_argument("--quick", action="store_true", help="few steps: a smoke test")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/data_mixing.json")
    parser.add_argument("--only", default="ddk,demix,rs2", help="parts to run (default: %(default)s)")
    args = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    sizes = QUICK if args.quick else WHOLE
    parts = {"ddk": followed, "demix": ranked, "rs2": repeated}
    path = ROOT / "benchmarks" / "results" / "data_mixing.json"
    found: dict[str, Any] = {}
    for name in args.only.split(","):
        before = sum(os.times()[:4])
        with tempfile.TemporaryDirectory() as folder:
            settings = getattr(sizes, name)
            found[name] = {"settings": settings, **parts[name](settings, Path(folder))}
        found[name]["cpu_seconds"] = round(sum(os.times()[:4]) - before)
    met = verdict(found)
    if args.save:
        from machine import described

        kept = json.loads(path.read_text()) if path.is_file() else {}
        kept.pop("settings", None)
        about = {"machine": described(), "met": kept.get("met", {}) | met}
        path.write_text(json.dumps(kept | about | found, indent=1) + "\n")
    cpu_seconds = sum(one["cpu_seconds"] for one in found.values())
    print(f"{cpu_seconds:.0f} s of one core; gates met: {met}")
    print(told(found))
    return 1 if args.check and not args.quick and not all(met.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
