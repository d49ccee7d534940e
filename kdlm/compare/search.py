"""A search for the best values of some keys of a recipe: Optuna proposes, runs of the comparison judge."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from kdlm.check import check
from kdlm.compare.planned import Planned, seeded, strangers
from kdlm.compare.running import made
from kdlm.compare.sections import Candidate, Choices, Comparison, Numbers, Search
from kdlm.compare.table import gathered
from kdlm.disk import write_text
from kdlm.recipe import load, resolved

BEST, FILE, STUDY = "best", "best.yaml", "search.db"


class Trial(NamedTuple):
    """A trial that ended: what it tried and what came of it, None if it failed."""

    number: int
    values: dict[str, Any]
    figure: float | None


def searched(comparison: Comparison, console: Console) -> tuple[Candidate, list[Trial]]:
    """Make the trials that are missing; return the best one and all of them, best first.

    Writes the best one's recipe as `best.yaml`. The study is `search.db`: a search that was stopped goes on with its
    open trials, and proposes what it would have proposed.

    Raises ValueError when no trial ended well, or when the folder has the study of another search; ImportError, with
    what to install, without Optuna.
    """
    search = comparison.search
    assert search is not None
    study, states = _study(comparison, search), _optuna().trial.TrialState
    kinds = {key: _distribution(space) for key, space in search.space.items()}
    while batch := _batch(study, search, comparison.workers, kinds):
        runs = {}
        for trial in batch:
            try:
                runs[trial.number] = _run(trial, search, comparison)
            except ValueError as error:
                console.print(f"trial {trial.number} cannot run: {error}", highlight=False, markup=False)
        said = made(list(runs.values()), comparison, console)
        metric = next(iter(comparison.metrics))
        for trial in batch:
            row = gathered([runs[trial.number]], said, metric)[0] if trial.number in runs else None
            if row is not None and row.figures:
                study.tell(trial.number, next(iter(row.figures.values()))[metric])
            else:
                study.tell(trial.number, state=states.FAIL)
    trials = _ended(study, comparison)
    if not trials or trials[0].figure is None:
        raise ValueError(f"search: none of {len(trials)} trials ended well, see {comparison.output / 'trials'}")
    best = candidate(search, trials[0].values)
    recipe = load(best.recipe, [*comparison.overrides, *best.overrides, f"run_dir={comparison.output / BEST}"])
    write_text(comparison.output / FILE, resolved(recipe))
    return best, trials


def candidate(search: Search, values: dict[str, Any]) -> Candidate:
    """Return the recipe of some values."""
    changes = [f"{key}={json.dumps(value)}" for key, value in values.items() if key != "recipe"]
    return Candidate(recipe=Path(values.get("recipe", search.recipe)), overrides=[*search.overrides, *changes])


def problems(comparison: Comparison) -> Iterator[str]:
    """Yield what is wrong with the space: every end and every choice is tried once, the other keys at their first."""
    search = comparison.search
    if search is None:
        return
    tried = {
        key: [space.low, space.high] if isinstance(space, Numbers) else space.choices
        for key, space in search.space.items()
    }
    whole = [key for key, space in search.space.items() if isinstance(space, Numbers) and space.whole]
    tried |= {key: [round(end) for end in tried[key]] for key in whole}
    first = {key: values[0] for key, values in tried.items()}
    said: dict[str, None] = {}
    for key, values in tried.items():
        for value in values:
            try:
                one = seeded("search", candidate(search, first | {key: value}), comparison)[0]
                check(one.recipe)
            except (ValueError, OSError) as error:
                said |= dict.fromkeys(f"search.space.{key}: {value!r}: {line}" for line in str(error).splitlines())
    yield from said


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise ImportError("search: needs Optuna: pip install 'kdlm[search]'") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _study(comparison: Comparison, search: Search) -> Any:
    """Open the study, or begin it. Raises ValueError when it is one of another search."""
    comparison.output.mkdir(parents=True, exist_ok=True)
    metric, way = next(iter(comparison.metrics.items()))
    what = search.model_dump(mode="json", exclude={"trials"}) | {
        "metric": [metric, way],
        "overrides of all": comparison.overrides,
        "seed of the runs": comparison.seeds[0],
    }
    study = _optuna().create_study(
        storage=f"sqlite:///{comparison.output / STUDY}",
        study_name="search",
        direction="minimize" if way == "lower" else "maximize",
        load_if_exists=True,
    )
    if study.user_attrs.setdefault("search", what) != what:
        raise ValueError(f"search: {comparison.output / STUDY} is of another search: remove it, or change `output`")
    study.set_user_attr("search", what)
    return study


def _batch(study: Any, search: Search, workers: int, kinds: dict[str, Any]) -> list[Any]:
    """Return the trials to make next: those that were left open, and new ones up to the number of workers."""
    optuna = _optuna()
    trials = study.get_trials(deepcopy=False)
    batch = [trial for trial in trials if trial.state == optuna.trial.TrialState.RUNNING]
    for trial in [trial for trial in batch if trial.params.keys() != kinds.keys()]:  # stopped while it was proposed
        study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
        batch.remove(trial)
    for number in range(len(trials), min(search.trials, len(trials) + workers - len(batch))):
        study.sampler = optuna.samplers.TPESampler(seed=search.seed + number)  # the same after a stop
        batch.append(study.ask(kinds))
    return batch


def _distribution(space: Numbers | Choices) -> Any:
    of = _optuna().distributions
    if isinstance(space, Choices):
        return of.CategoricalDistribution([json.dumps(choice) for choice in space.choices])
    if space.whole:
        return of.IntDistribution(round(space.low), round(space.high), log=space.log)
    return of.FloatDistribution(space.low, space.high, log=space.log)


def _values(search: Search, trial: Any) -> dict[str, Any]:
    """Return what a trial tries, as the recipe has it."""
    return {
        key: json.loads(trial.params[key]) if isinstance(space, Choices) else trial.params[key]
        for key, space in search.space.items()
    }


def _run(trial: Any, search: Search, comparison: Comparison) -> Planned:
    """Return the run of a trial. Raises ValueError when its values do not go together."""
    one = comparison.model_copy(update={"seeds": comparison.seeds[:1], "output": comparison.output / "trials"})
    run = seeded(str(trial.number), candidate(search, _values(search, trial)), one)[0]
    if wrong := strangers(run):
        raise ValueError(wrong[0])
    check(run.recipe)
    return run


def _ended(study: Any, comparison: Comparison) -> list[Trial]:
    search = comparison.search
    assert search is not None
    sign = 1 if next(iter(comparison.metrics.values())) == "lower" else -1
    trials = [
        Trial(trial.number, _values(search, trial), trial.value)
        for trial in study.get_trials(deepcopy=False)
        if trial.params.keys() == search.space.keys()
    ]
    return sorted(trials, key=lambda t: (t.figure is None, sign * (t.figure or 0.0), t.number))
