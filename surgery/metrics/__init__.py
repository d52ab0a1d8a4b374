"""The paper's metrics as torchmetrics classes: states are sums, so they merge over shards."""

from surgery.metrics.analysis import ClassMean, ImageMean, Survival
from surgery.metrics.confusion import Confusion
from surgery.metrics.contrast import MeanScoreContrast
from surgery.metrics.points import MaskIoU, PointAccuracy
from surgery.metrics.precision import MeanAveragePrecision
from surgery.metrics.threshold import ThresholdIoU
from surgery.metrics.tokens import TokenRanks
from surgery.metrics.words import WordCounts

__all__ = [
    "ClassMean",
    "Confusion",
    "ImageMean",
    "MaskIoU",
    "MeanAveragePrecision",
    "MeanScoreContrast",
    "PointAccuracy",
    "Survival",
    "ThresholdIoU",
    "TokenRanks",
    "WordCounts",
]
