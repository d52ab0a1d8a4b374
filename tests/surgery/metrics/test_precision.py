"""AP against a plain loop over the ranking, and scikit-learn where it is installed."""

import numpy as np
import pytest
import torch

from surgery.metrics import MeanAveragePrecision
from tasks.measures import Measures


def samples(rows: int = 60, classes: int = 5) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(1)
    truth = random.random((rows, classes)) < np.array([0.5, 0.3, 0.1, 0.02, 0.0])
    scores = (random.normal(size=truth.shape) + truth).round(1)  # many are equal
    return scores.astype(np.float32), truth


def by_hand(scores: np.ndarray, truth: np.ndarray) -> float:
    """Mean over positives of the precision among all images that score at least as much."""
    return float(np.mean([truth[scores >= s].mean() for s in scores[truth]]))


def filled(*parts: slice) -> MeanAveragePrecision:
    metric = MeanAveragePrecision(5)
    for part in parts:
        metric.update(*(torch.from_numpy(values[part]) for values in samples()))
    return metric


def test_against_a_plain_loop():
    scores, truth = samples()
    expected = [by_hand(scores[:, c], truth[:, c]) for c in range(4)]
    metric = filled(slice(None))
    assert metric.per_class()[:4].tolist() == pytest.approx(expected, abs=1e-12)
    assert metric.per_class()[4].isnan()
    assert float(metric.compute()) == pytest.approx(np.mean(expected), abs=1e-12)
    assert metric.positives().tolist() == truth.sum(0).tolist()


def test_against_scikit_learn():
    reference = pytest.importorskip("sklearn.metrics").average_precision_score
    scores, truth = samples()
    expected = [reference(truth[:, c], scores[:, c]) for c in range(4)]
    assert filled(slice(None)).per_class()[:4].tolist() == pytest.approx(expected, abs=1e-12)


def test_the_order_of_images_does_not_matter():
    one, other = filled(slice(None)), filled(slice(30, 60), slice(30))
    torch.testing.assert_close(one.per_class(), other.per_class(), equal_nan=True, rtol=0, atol=0)


def test_states_of_shards_merge_also_with_an_empty_one():
    merged = {"map": MeanAveragePrecision(5)}
    for part in (slice(20), slice(0, 0), slice(20, 60)):
        state = filled(part).metric_state
        stored = {f"map.{k}": torch.cat(v) for k, v in state.items() if part.stop}
        Measures(merged).merge(stored)
    torch.testing.assert_close(
        merged["map"].per_class(), filled(slice(None)).per_class(), equal_nan=True, rtol=0, atol=0
    )


def test_nothing_seen():
    metric = MeanAveragePrecision(3)
    assert metric.compute().isnan()
    assert metric.positives().tolist() == [0, 0, 0]


def test_other_shapes_are_refused():
    with pytest.raises(ValueError, match=r"\[B, 3\]"):
        MeanAveragePrecision(3).update(torch.zeros(2, 4), torch.zeros(2, 4))
