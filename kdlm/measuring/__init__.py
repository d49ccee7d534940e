"""Measuring: what a student keeps of its teacher on any text, with standard errors over documents."""

from kdlm.measuring.derived import derived
from kdlm.measuring.generations import measure_generations
from kdlm.measuring.measure import measure
from kdlm.measuring.reading import Reader, Reading
from kdlm.measuring.tally import Measured, Tally

__all__ = ["Measured", "Reader", "Reading", "Tally", "derived", "measure", "measure_generations"]
