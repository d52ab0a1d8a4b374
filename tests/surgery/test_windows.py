"""Tiles and windows, and the best text at each pixel, against dense computations."""

import pytest
import torch
import torch.nn.functional as F

from surgery import labels, similarity_to_points
from surgery.labels import best_text
from surgery.points import combined_points
from surgery.windows import Window, cut_windows, window_similarities


@pytest.mark.parametrize(
    ("size", "window", "stride"),
    [((40, 40), 16, 16), ((33, 50), 16, 8), ((10, 50), 16, 5), ((16, 16), 16, 3), ((7, 9), 16, 16)],
)
def test_windows_cover_everything_and_stay_inside(size, window, stride):
    seen = torch.zeros(size)
    boxes = cut_windows(size, window, stride)
    for box in boxes:
        box.of(seen).add_(1)
        assert box.of(seen).shape == (min(window, size[0]), min(window, size[1]))
    assert seen.min() >= 1
    assert len(set(boxes)) == len(boxes)


def test_cityscapes_is_eight_tiles():
    boxes = cut_windows((1024, 2048), 512)
    assert len(boxes) == 8
    assert boxes[5] == Window(512, 512, 512, 512)


def test_a_stride_over_the_window_is_refused():
    with pytest.raises(ValueError, match="stride"):
        cut_windows((32, 32), 16, 17)


@pytest.mark.parametrize("budget", [1, 700, 1 << 24])
def test_few_texts_at_a_time_give_the_same(monkeypatch, budget):
    scores = torch.randn(9, 4, 5, generator=torch.Generator().manual_seed(0)) / 10
    monkeypatch.setattr(labels, "_NUMBERS_AT_ONCE", budget)
    whole = [Window(0, 0, 32, 40)]
    index, probability = best_text([scores], whole, (32, 40), (13, 22), (8, 8), scale=40.0)
    dense = F.interpolate(scores[None], size=(13, 22), mode="bilinear")[0]
    assert torch.equal(index, dense.argmax(0))
    torch.testing.assert_close(probability, (40 * dense).softmax(0).amax(0))


def test_overlapping_windows_are_averaged_and_padding_is_cut_off():
    generator = torch.Generator().manual_seed(0)
    boxes = cut_windows((12, 20), 12, 8)
    scores = [torch.randn(3, 2, 2, generator=generator) for _ in boxes]  # 12 pixels, patches of 8
    index, _ = best_text(scores, boxes, (12, 20), (12, 20), (8, 8))
    total, count = torch.zeros(3, 12, 20), torch.zeros(12, 20)
    for window, part in zip(boxes, scores, strict=True):
        large = F.interpolate(part[None], size=(16, 16), mode="bilinear")[0, :, :12, :12]
        total[:, :, window.left : window.left + 12] += large
        count[:, window.left : window.left + 12] += 1
    assert [v.left for v in boxes] == [0, 8]
    assert count.max() == 2
    assert torch.equal(index, (total / count).argmax(0))


@pytest.mark.parametrize("texts", [1, 5, 40])
def test_the_whole_image_at_once_is_enlarged_as_torch_would(texts):
    scores = torch.randn(texts, 6, 9, generator=torch.Generator().manual_seed(0))
    window = cut_windows((48, 72), None, None)
    with torch.autocast("cpu", torch.bfloat16):  # whose products are too coarse for this
        index, probability = best_text([scores], window, (48, 72), (250, 333), (8, 8), scale=40.0)
    large = F.interpolate(scores[None].double(), size=(250, 333), mode="bilinear")[0]
    assert torch.equal(index, large.argmax(0))
    expected = (40 * large).softmax(0).amax(0).float()
    torch.testing.assert_close(probability, expected, rtol=0, atol=1e-4)


def test_views_of_images_of_several_sizes_are_those_of_each_alone(network):
    backbone = network("vit")
    generator = torch.Generator().manual_seed(0)
    text = torch.randn(3, 64, generator=generator)
    images = [
        torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=generator)
        for size in ((64, 96), (96, 64), (64, 96))
    ]
    boxes = [cut_windows((i.shape[1], i.shape[2]), 64, 32) for i in images]
    together = window_similarities(backbone, images, boxes, text)
    for image, mine, found in zip(images, boxes, together, strict=True):
        for window, values in zip(mine, found, strict=True):
            tokens = backbone.encode_image(backbone.preprocess(window.of(image)[None]))
            dense = F.normalize(tokens.patch_tokens[0], dim=-1) @ F.normalize(text, dim=-1).T
            torch.testing.assert_close(values.flatten(1).T, dense, rtol=0, atol=1e-5)


def test_one_text_combined_is_that_text():
    similarity = torch.randn(48, 1, generator=torch.Generator().manual_seed(0))
    points, labels = combined_points(similarity, (6, 8), (60, 80), threshold=0.7)
    expected = similarity_to_points(similarity[:, 0], (6, 8), (60, 80), threshold=0.7)
    assert torch.equal(points, expected[0])
    assert torch.equal(labels, expected[1])


def test_two_texts_give_positives_of_each_and_negatives_of_their_mean():
    similarity = torch.rand(48, 2, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [1, 9]
    )
    points, labels = combined_points(similarity, (6, 8), (60, 80))
    scaled = (similarity - similarity.amin(0)) / (similarity.amax(0) - similarity.amin(0))
    expected = []
    for values, sign in ((similarity[:, 0], 1), (similarity[:, 1], 1), (scaled.mean(1), 0)):
        found, signs = similarity_to_points(values, (6, 8), (60, 80))
        expected += [(*point, sign) for point in found[signs == sign].tolist()]
    assert torch.cat([points, labels[:, None]], dim=1).tolist() == [list(e) for e in expected]
    assert labels.tolist() == sorted(labels.tolist(), reverse=True)
