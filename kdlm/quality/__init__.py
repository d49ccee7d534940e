"""How good generated samples are, and pictures of them; how far a classifier can be trusted."""

from kdlm.quality.attacks import carlini_wagner, fgsm
from kdlm.quality.calibration import (
    calibration_error,
    calibration_sums,
    reliability,
    reliability_sums,
    with_calibration_error,
)
from kdlm.quality.frechet import FrechetStats, frechet_distance
from kdlm.quality.manifold import PrecisionRecall, precision_recall
from kdlm.quality.measures import FeatureNet, accuracy_of, quality_of, seen_by
from kdlm.quality.modes import ModeReport, mode_report
from kdlm.quality.pictures import grid, scatter, side_by_side, write_image_folder, write_png
from kdlm.quality.sampling import SamplingSection, Yardstick, yardstick
from kdlm.quality.texts import distinct, repetition, text_figures

__all__ = [
    "FeatureNet",
    "FrechetStats",
    "ModeReport",
    "PrecisionRecall",
    "SamplingSection",
    "Yardstick",
    "accuracy_of",
    "calibration_error",
    "calibration_sums",
    "carlini_wagner",
    "distinct",
    "fgsm",
    "frechet_distance",
    "grid",
    "mode_report",
    "precision_recall",
    "quality_of",
    "reliability",
    "reliability_sums",
    "repetition",
    "scatter",
    "seen_by",
    "side_by_side",
    "text_figures",
    "with_calibration_error",
    "write_image_folder",
    "write_png",
    "yardstick",
]
