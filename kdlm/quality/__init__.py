"""How good generated samples are, and pictures of them."""

from kdlm.quality.frechet import FrechetStats, frechet_distance
from kdlm.quality.manifold import PrecisionRecall, precision_recall
from kdlm.quality.measures import FeatureNet, accuracy_of, quality_of, seen_by
from kdlm.quality.modes import ModeReport, mode_report
from kdlm.quality.pictures import grid, scatter, side_by_side, write_image_folder, write_png

__all__ = [
    "FeatureNet",
    "FrechetStats",
    "ModeReport",
    "PrecisionRecall",
    "accuracy_of",
    "frechet_distance",
    "grid",
    "mode_report",
    "precision_recall",
    "quality_of",
    "scatter",
    "seen_by",
    "side_by_side",
    "write_image_folder",
    "write_png",
]
