"""`kdlm report`: what runs were and what they measured, as one HTML file and as pictures."""

from kdlm.report.drawing import png
from kdlm.report.figures import figures
from kdlm.report.run import Run, read_run, read_runs
from kdlm.report.writing import pictures, report

__all__ = ["Run", "figures", "pictures", "png", "read_run", "read_runs", "report"]
