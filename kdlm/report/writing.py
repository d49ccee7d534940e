"""`kdlm report`: read runs, write the page."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from kdlm.disk import write_text
from kdlm.report.drawing import bundle, write_pngs
from kdlm.report.figures import figures
from kdlm.report.page import page
from kdlm.report.run import read_runs


def report(paths: Sequence[str | Path], output: Path, *, pngs: Path | None = None) -> Iterator[str]:
    """Write the report of these run folders, and say a line for each thing that was done.

    Args:
        paths: run folders.
        output: the HTML file.
        pngs: folder that every figure is written to as PNG as well.

    Raises ValueError for a folder that is no run, ImportError where vl-convert-python is missing; both before anything
    is written.
    """
    runs = read_runs(paths)
    text = page(runs, bundle())
    write_text(output, text)
    yield f"report: {output} ({len(text.encode()) / 1e6:.1f} MB, {len(runs)} run{'s' * (len(runs) > 1)})"
    if pngs is not None:
        yield f"figures: {len(write_pngs(figures(runs), pngs))} PNG files in {pngs}"
