"""Prompt points for several texts at once."""

from functools import partial

import torch
from torch import Tensor

from surgery.features import similarity_to_points


def combined_points(
    similarity: Tensor,
    grid: tuple[int, int],
    size: tuple[int, int],
    *,
    threshold: float = 0.8,
    down_sample: int = 2,
) -> tuple[Tensor, Tensor]:
    """Points for the union of M texts.

    Positive points are those of every text's own map; negative ones those of the mean of the maps,
    each scaled to [0, 1] first, so that no text is a background of another (the released demo's way
    with "person+bench"). One text gives what `similarity_to_points` gives.

    Args:
        similarity: [N, M], N = h*w.
        grid: (h, w).
        size: (H, W) of the image.
        threshold: of `similarity_to_points`.
        down_sample: of the same.

    Returns:
        Points [K, 2] and labels [K] as of that function; none without texts.
    """
    find = partial(
        similarity_to_points, grid=grid, size=size, threshold=threshold, down_sample=down_sample
    )
    if not similarity.shape[1]:
        return similarity.new_empty(0, 2, dtype=torch.int64), similarity.new_empty(
            0, dtype=torch.int64
        )
    low, high = similarity.amin(0), similarity.amax(0)
    scaled = (similarity - low) / (high - low).clamp_min(torch.finfo(similarity.dtype).tiny)
    mean_points, mean_labels = find(scaled.mean(1))
    chosen = []
    for column in similarity.T:
        points, labels = find(column)
        chosen.append(points[labels == 1])
    positives, negatives = torch.cat(chosen), mean_points[mean_labels == 0]
    labels = torch.cat([positives.new_ones(len(positives)), negatives.new_zeros(len(negatives))])
    return torch.cat([positives, negatives]), labels
