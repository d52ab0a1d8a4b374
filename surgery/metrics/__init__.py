"""The paper's metrics as torchmetrics classes: states are sums, so they merge over shards."""

from surgery.metrics.contrast import MeanScoreContrast
from surgery.metrics.threshold import ThresholdIoU

__all__ = ["MeanScoreContrast", "ThresholdIoU"]
