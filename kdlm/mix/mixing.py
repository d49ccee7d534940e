"""`kdlm mix`: components, three rounds of judged mixtures, and the recipe of the best."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from transformers.utils import logging as hf_logging

from kdlm.disk import write_text
from kdlm.markdown import table
from kdlm.mix.candidates import Weights, drawn
from kdlm.mix.components import SCORES, Proxies, components, names, whole
from kdlm.mix.regression import Fitted, fitted
from kdlm.mix.sections import Mixture
from kdlm.recipe import Recipe, resolved

ROUNDS = (1, 2, 4)
"""What the evaluations of each round are divided by."""


def mix(mixture: Mixture, console: Console | None = None) -> dict[str, float]:
    """Find the weights of the sources, write `mixture.json` and `recipe.yaml`, and return the weights by source.

    Started again, the command goes on with components and judgements that are there.
    Raises ValueError, before anything is run, with all that is wrong.
    """
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    console = console or Console(soft_wrap=True)
    recipe = whole(mixture)
    runs = components(mixture, recipe, console)
    proxies = Proxies(mixture, recipe, [run.folder / "student" for run in runs])
    try:
        judged = Judged(mixture, proxies, names(recipe), console)
        samples = mixture.samples or _samples(proxies.trainer.args, proxies.sizes)
        weights, fit = searched(mixture, judged, proxies.sizes, samples)
        score = judged([weights])[0]
    finally:
        proxies.close()
    found = dict(zip(names(recipe), weights.tolist(), strict=True))
    _write(mixture, found, score, fit, judged)
    write_text(mixture.output / "recipe.yaml", resolved(weighted(recipe, weights, proxies.sizes, samples)))
    console.print(table(["source", "weight"], [(name, f"{weight:.3f}") for name, weight in found.items()]))
    console.print(
        f"{mixture.metric} of their average {score:.4g}; predictions of left-out mixtures agree by {fit.agreement:.2f} "
        f"(Spearman, {len(judged.weights)} judged)\nrecipe: {mixture.output / 'recipe.yaml'}",
        highlight=False,
    )
    return found


def searched(mixture: Mixture, judged: "Judged", sizes: np.ndarray, samples: float) -> tuple[np.ndarray, Fitted]:
    """Return the average of the mixtures with the best predictions, and what predicts."""
    section = mixture.candidates
    pool = drawn(section.pool, sizes, samples, section, np.random.default_rng([mixture.seed, 0]))
    best, fit = pool, None
    for number, part in enumerate(ROUNDS, start=1):
        generator = np.random.default_rng([mixture.seed, number])
        count = min(len(best), max(1, mixture.evaluations // part))
        judged(best[generator.choice(len(best), count, replace=False)])
        fit = fitted(np.array(judged.weights), np.array(judged.scores))
        order = np.argsort(fit(pool) * (1 if mixture.better == "lower" else -1), kind="stable")
        best = pool[order[: section.average]]
    assert fit is not None
    return best.mean(0), fit


class Judged:
    """The mixtures that were judged, each once; kept in `scores.jsonl`, from which a stopped search goes on."""

    def __init__(self, mixture: Mixture, proxies: Any, sources: Sequence[str], console: Console):
        self.metric, self.proxies, self.sources, self.console = mixture.metric, proxies, sources, console
        self.path = mixture.output / SCORES
        self.weights: list[list[float]] = []
        self.scores: list[float] = []
        self._known = _read(self.path, mixture.metric)

    def __call__(self, mixtures: Weights | list[np.ndarray]) -> list[float]:
        """Return the score of each mixture."""
        scores = []
        for place, weights in enumerate(mixtures, start=1):
            key = tuple(weights.tolist())
            score = self._known.get(key)
            if score is None:
                score = self._known[key] = self.proxies.score(weights)
                with open(self.path, "a", encoding="utf-8") as file:
                    file.write(json.dumps({"weights": key, self.metric: score}) + "\n")
            self.weights.append(list(key))
            self.scores.append(score)
            scores.append(score)
            shares = ", ".join(f"{name} {weight:.2f}" for name, weight in zip(self.sources, key, strict=True))
            said = f"[{place}/{len(mixtures)}] {self.metric} {score:.4g} of {shares}"
            self.console.print(said, highlight=False, markup=False)
        return scores


def _read(path: Path, metric: str) -> dict[tuple[float, ...], float]:
    """Return what was judged before; a line that a kill cut short is left out."""
    known: dict[tuple[float, ...], float] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if metric in row:
            known[tuple(row["weights"])] = row[metric]
    return known


def _samples(args: Any, sizes: np.ndarray) -> float:
    """Return how many sequences a run with these arguments trains on, on one process."""
    if args.max_steps > 0:
        return float(args.max_steps * args.per_device_train_batch_size * args.gradient_accumulation_steps)
    return float(args.num_train_epochs * sizes.sum())


def weighted(recipe: Recipe, weights: np.ndarray, sizes: np.ndarray, samples: float) -> Recipe:
    """Return the recipe with the weights. The mix ends with its first source that is used up where that is far enough
    for the run, and else goes on till the last one is, smaller sources starting again."""
    data: Any = recipe.data
    sources = [one.model_copy(update={"weight": float(w)}) for one, w in zip(data.train, weights, strict=True)]
    enough = (sizes / weights).min() >= samples
    strategy = "first_exhausted" if enough else "all_exhausted"
    changed = data.model_copy(update={"train": sources, "stopping_strategy": strategy})
    return recipe.model_copy(update={"data": changed})


def _write(mixture: Mixture, found: dict[str, float], score: float, fit: Fitted, judged: Judged) -> None:
    about = {
        "weights": found,
        mixture.metric: score,
        "agreement": fit.agreement,
        "penalty": fit.penalty,
        "judged": [
            {"weights": weights, mixture.metric: one}
            for weights, one in zip(judged.weights, judged.scores, strict=True)
        ],
    }
    write_text(mixture.output / "mixture.json", json.dumps(about, indent=1) + "\n")
