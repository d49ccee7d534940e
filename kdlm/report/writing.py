"""`kdlm report`: read runs, look into their students, write the page."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from kdlm.disk import write_text
from kdlm.report.drawing import bundle, png, write_pngs
from kdlm.report.evaluation import jobs_of, read_job
from kdlm.report.figures import figures
from kdlm.report.page import page
from kdlm.report.run import Run, made, read_run, read_runs, run_folders


def report(
    paths: Sequence[str | Path], output: Path, *, pngs: Path | None = None, inspect: bool = True
) -> Iterator[str]:
    """Write the report of these run folders, and yield a line for each thing that was done.

    Args:
        paths: run folders, and folders of runs of several stages, of which those that train are shown; also results of
            `kdlm eval`, a folder or its results.json, which are shown last.
        output: the HTML file.
        pngs: folder that every figure is written to as PNG as well.
        inspect: load student and teacher of finished runs that were not inspected yet, for the heat map and the
            reliability diagram.

    Raises ValueError for a folder that is no run, ImportError where vl-convert-python is missing; both before anything
    is written.
    """
    others = [line for path in paths for line in made(path)]
    script, paths = bundle(), run_folders(paths)
    jobs = {str(path): job for path in paths if not _is_run(path) and (job := read_job(Path(path))) is not None}
    runs = read_runs([path for path in paths if str(path) not in jobs])
    if not runs:
        raise ValueError(f"{paths[0]}: results of an evaluation alone: give a run folder of kdlm train too")
    if inspect:
        runs = [inspected(run) for run in runs]
    text = page(runs, script, jobs_of(runs) | jobs)
    write_text(output, text)
    yield from others
    yield f"report: {output} ({len(text.encode()) / 1e6:.1f} MB, {len(runs)} run{'s' * (len(runs) > 1)})"
    if pngs is not None:
        yield f"figures: {len(write_pngs(figures(runs), pngs))} PNG files in {pngs}"


def pictures(folder: Path) -> Mapping[str, bytes]:
    """Return the figures of a run folder as PNG by name, for trackers.

    The run is over and saved, so what keeps figures from being drawn is printed, not raised: none are returned.
    """
    try:
        return {name: png(spec) for name, spec in figures([read_run(folder)]).items()}
    except (ImportError, ValueError) as error:
        print(f"note: the tracker gets no figures: {error}")
        return {}


def inspected(run: Run) -> Run:
    """Return the run with an inspection of its student, or with a note that says why there is none."""
    if not (run.path / "student").is_dir():
        return run
    from transformers.utils import logging

    from kdlm.inspection import inspect_run

    logging.disable_progress_bar()
    try:
        found: dict[str, Any] = inspect_run(run.path)
    except (ValueError, OSError, ImportError) as error:
        return replace(run, notes=[*run.notes, f"not inspected: {error}"])
    return replace(run, inspection=found)


def _is_run(path: str | Path) -> bool:
    return (Path(path) / "recipe.yaml").is_file()
