"""mIoU of the data set against scikit-learn's confusion matrix and plain loops."""

import numpy as np
import pytest
import torch

from surgery.metrics import Confusion


def images(count: int = 5, classes: int = 4) -> list[tuple[np.ndarray, np.ndarray]]:
    random = np.random.default_rng(0)
    made = []
    for _ in range(count):
        truth = random.integers(0, classes, (9, 7))
        truth[random.random(truth.shape) < 0.2] = 255
        truth[truth == 3] = 0  # the last class never occurs
        made.append((random.integers(0, classes - 1, truth.shape), truth))
    return made


def test_against_counts_over_the_whole_data_set():
    metric = Confusion(4)
    for predicted, truth in images():
        metric.update(torch.from_numpy(predicted), torch.from_numpy(truth))
    predicted, truth = (np.concatenate(part, axis=None) for part in zip(*images(), strict=True))
    kept = truth != 255
    predicted, truth = predicted[kept], truth[kept]
    expected = [
        np.sum((predicted == c) & (truth == c)) / np.sum((predicted == c) | (truth == c))
        for c in range(3)
    ]
    assert metric.per_class()[:3].tolist() == pytest.approx(expected)
    assert metric.per_class()[3].isnan()
    assert float(metric.compute()) == pytest.approx(np.mean(expected))
    assert float(metric.pixel_accuracy()) == pytest.approx(np.mean(predicted == truth))
    assert metric.pixels().tolist() == [int(np.sum(truth == c)) for c in range(4)]


def test_a_class_predicted_where_it_never_is_counts_as_zero():
    metric = Confusion(2)
    metric.update(torch.tensor([0, 1]), torch.tensor([0, 0]))
    assert metric.per_class().tolist() == [0.5, 0.0]


def test_negative_truth_is_left_out():
    metric = Confusion(2)
    metric.update(torch.tensor([0, 1]), torch.tensor([-1, 1]))
    assert float(metric.pixel_accuracy()) == 1.0
    assert int(metric.matrix.sum()) == 1
