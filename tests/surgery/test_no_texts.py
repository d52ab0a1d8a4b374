"""Images without a single class: formulas answer with nothing, and metrics count nothing."""

import pytest
import torch

from surgery import feature_surgery, similarity, similarity_map
from surgery.analysis import (
    affinity,
    foreground_selection,
    map_distance,
    map_likeness,
    strongest,
)
from surgery.labels import best_text
from surgery.metrics import (
    ClassMean,
    MeanAveragePrecision,
    MeanScoreContrast,
    ThresholdIoU,
)
from surgery.points import combined_points
from surgery.windows import Window

NO_TEXT = torch.empty(0, 4)


@pytest.mark.parametrize("batch", [0, 1, 2])
def test_formulas(batch):
    patches, token = torch.ones(batch, 6, 4), torch.ones(batch, 4)
    assert similarity(patches, NO_TEXT).shape == (batch, 6, 0)
    for redundant in (None, torch.ones(1, 4)):
        freed = feature_surgery(patches, token, NO_TEXT, redundant=redundant)
        assert freed.shape == (batch, 6, 0)
    for order in ("code", "paper"):
        assert similarity_map(freed, (2, 3), (7, 8), order=order).shape == (batch, 0, 7, 8)


def test_points_and_analyses():
    points, labels = combined_points(torch.empty(6, 0), (2, 3), (7, 8))
    assert (points.shape, labels.shape) == ((0, 2), (0,))
    assert points.dtype == labels.dtype == torch.int64
    queries = strongest(torch.empty(6, 0))
    assert foreground_selection(torch.ones(7, 7), queries, torch.empty(0, 6)).shape == (0,)
    assert affinity(torch.ones(7, 4), NO_TEXT).isnan().all()
    assert map_distance(torch.empty(0, 4, 5), torch.ones(4, 5)).shape == (0, 2)
    assert map_likeness(torch.empty(6, 0), torch.ones(6)).shape == (0, 2)


def test_no_text_is_the_best():
    with pytest.raises(ValueError, match="one or more texts"):
        best_text([torch.empty(0, 2, 3)], [Window(0, 0, 4, 6)], (4, 6), (4, 6), (2, 2))


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
@pytest.mark.parametrize("classes", [torch.tensor([]), torch.empty(0, dtype=torch.int64)])
def test_metrics_of_an_image_without_positives(classes):
    maps, valid = torch.empty(0, 4, 4), torch.ones(4, 4, dtype=torch.bool)
    contrast, iou, means = MeanScoreContrast(2), ThresholdIoU(2), ClassMean(2, dims=1)
    contrast.update(maps, maps > 0, valid, classes)
    iou.update(maps, maps > 0, valid, classes)
    means.update(torch.empty(0, 3), classes)
    for metric in (contrast, iou, means):
        assert metric.compute().isnan().all()
    assert iou.compute_per_image().isnan()
    foreground = torch.tensor([[[True, False], [False, False]]])
    iou.update(foreground.float(), foreground, valid[:2, :2], torch.tensor([1]))
    assert iou.compute_per_image() == 1


def test_precision_of_no_images():
    metric = MeanAveragePrecision(2)
    metric.update(torch.empty(0, 2), torch.empty(0, 2, dtype=torch.bool))
    assert metric.compute().isnan()
    assert metric.per_class().isnan().tolist() == [True, True]
