"""Enlarging by products, beside torch's own and beside each image alone."""

import pytest
import torch

from surgery.enlarging import inside, min_max_inside, padded_maps
from surgery.features import similarity_map
from surgery.labels import best_text, best_texts
from surgery.windows import cut_windows

SIZES = [(31, 40), (50, 22), (9, 7), (31, 40)]


@pytest.mark.parametrize("order", ["code", "paper"])
def test_maps_of_many_sizes_are_those_of_each_image(order):
    torch.manual_seed(0)
    images = torch.tensor([0, 0, 1, 2, 3])
    scores = torch.randn(5, 6, 9)
    scores[3] = 2.0  # a constant map
    maps = padded_maps(scores, images, SIZES)
    own = inside(SIZES, scores.device)
    if order == "paper":
        maps = min_max_inside(maps, own[images])
    assert maps.shape == (5, 50, 40)
    assert (maps[~own[images]] == 0).all()
    for row, image in enumerate(images.tolist()):
        height, width = SIZES[image]
        alone = similarity_map(scores[row].reshape(1, -1, 1), (6, 9), SIZES[image], order=order)
        torch.testing.assert_close(maps[row, :height, :width], alone[0, 0], atol=1e-6, rtol=0)
        assert own[image].sum() == height * width


@pytest.mark.parametrize(
    ("size", "window", "stride"),
    [((48, 72), None, None), ((44, 70), 24, 16), ((50, 70), 20, 20), ((16, 70), 24, 13)],
)
def test_labels_of_many_images_are_those_of_each(size, window, stride):
    torch.manual_seed(0)
    boxes = cut_windows(size, window, stride)
    grid = -(-boxes[0].height // 8), -(-boxes[0].width // 8)
    scores = [[torch.randn(5, *grid) for _ in boxes] for _ in SIZES]
    index, probability = best_texts(scores, [boxes] * 4, [size] * 4, SIZES, (8, 8), scale=3.0)
    for i, (height, width) in enumerate(SIZES):
        alone, likely = best_text(scores[i], boxes, size, SIZES[i], (8, 8), scale=3.0)
        own = (i, slice(height), slice(width))
        assert (index[own] != alone).float().mean() < 1e-3
        torch.testing.assert_close(probability[own], likely, atol=1e-5, rtol=0)
