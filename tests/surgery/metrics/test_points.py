"""Point accuracy and mask IoU, counted by hand."""

import torch

from surgery.metrics import MaskIoU, PointAccuracy

ALL = torch.ones(4, 6, dtype=torch.bool)
LEFT = torch.arange(6).expand(4, 6) < 3


def test_points_are_x_y():
    metric = PointAccuracy(2)
    points = torch.tensor([[0, 3], [5, 0], [4, 3], [1, 1]])
    metric.update(points, torch.tensor([1, 1, 0, 0]), LEFT, ALL, 1)
    assert float(metric.compute()) == 0.5
    assert float(metric.of(1)) == float(metric.of(0)) == 0.5
    assert metric.per_class().isnan().tolist() == [True, False]


def test_points_on_void_are_not_counted():
    metric = PointAccuracy(1)
    valid = ALL.clone()
    valid[:, 0] = False
    metric.update(torch.tensor([[0, 0], [1, 0]]), torch.tensor([1, 1]), LEFT, valid, 0)
    assert metric.points.tolist() == [[0, 1]]
    assert float(metric.compute()) == 1.0


def test_no_points_at_all():
    metric = PointAccuracy(1)
    metric.update(torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0), LEFT, ALL, 0)
    assert metric.compute().isnan()


def test_iou_is_of_sums_over_images_and_mean_over_classes():
    metric = MaskIoU(3)
    metric.update(ALL, LEFT, ALL, 0)  # 12 of 24
    metric.update(LEFT, LEFT, ALL, 0)  # 12 of 12
    metric.update(~LEFT, LEFT, ALL, 2)  # 0 of 24
    assert metric.per_class()[[0, 2]].tolist() == [24 / 36, 0.0]
    assert float(metric.compute()) == 12 / 36
    metric.update(ALL, LEFT, LEFT, 1)
    assert float(metric.per_class()[1]) == 1.0
