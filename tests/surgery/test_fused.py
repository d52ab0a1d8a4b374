"""CLIPer's score, against the numbers of its own code."""

import pytest
import torch

from common.errors import InvalidSetting
from surgery.fused import fused_labels, fused_scores, read_layers, read_parts
from surgery.windows import cut_windows

FOREGROUND = torch.arange(9) < 6


@pytest.fixture(scope="module")
def expected(reference):
    return {**reference("newer"), **reference("cliper")}


@pytest.fixture(scope="module")
def layers(reference, network):
    return read_layers(network("vit"), reference("inputs")["images_vit"])


def test_tokens_of_all_layers(layers, expected):
    close = {"rtol": 0, "atol": 2e-5}
    torch.testing.assert_close(layers.tokens[-1], expected["cliper"], **close)
    torch.testing.assert_close(layers.tokens[:, 0], expected["cliper_layers_image0"], **close)
    torch.testing.assert_close(layers.attention, expected["cliper_attention"], rtol=0, atol=5e-6)


@pytest.mark.parametrize(
    ("stored", "scale", "fuse"),
    [
        ("cliper_seg", 50.0, True),
        ("cliper_seg_scale10", 10.0, True),
        ("cliper_seg_no_fusion", 50.0, False),
    ],
)
def test_scores(stored, scale, fuse, layers, expected, texts):
    found = fused_scores(layers, texts, FOREGROUND, scale=scale, threshold=0.2, fuse=fuse)
    torch.testing.assert_close(found, expected[stored], rtol=0, atol=2e-5)


def test_scores_at_another_size(expected, reference, network, texts):
    images = reference("inputs")["images_vit_large"]
    layers = read_layers(network("vit"), images)
    found = fused_scores(layers, texts, FOREGROUND, scale=50.0, threshold=0.2)
    torch.testing.assert_close(found, expected["cliper_seg_large"], rtol=0, atol=2e-5)
    alone = fused_scores(
        read_layers(network("vit"), images[1:2, :, :96]), texts, FOREGROUND, scale=50.0
    )
    assert alone.shape == (1, 6, 6, 9)


def test_scores_of_windows_beside_the_whole(expected, reference, network, texts):
    images, net = reference("inputs")["images_vit_large"], network("vit")
    # Its stride of 112 is longer than the window; at this size, that is one of 48.
    parts = read_parts(net, images, cut_windows((144, 144), 96, 48))
    assert [len(part.cells) for part in parts] == [36] * 4
    layers = read_layers(net, images)
    found = fused_scores(layers, texts, FOREGROUND, scale=50.0, threshold=0.2, parts=parts)
    torch.testing.assert_close(found, expected["cliper_seg_large_sliding"], rtol=0, atol=2e-5)
    with pytest.raises(InvalidSetting, match="one of 96 x 96 at row 0, column 40, doesn't"):
        read_parts(net, images, cut_windows((144, 144), 96, 40))


def test_labels(layers, expected, texts):
    scale, background, least = expected["cliper_prediction_settings"].tolist()
    scores = fused_scores(layers, texts, FOREGROUND, scale=scale, threshold=0.2)
    found = fused_labels(scores, (50, 70), background=background, least=least)
    assert torch.equal(found, expected["cliper_prediction"].long())
    assert (found == 0).any()
    everywhere = fused_labels(scores, (50, 70), background=None)
    assert (everywhere > 0).all()
    some = fused_labels(scores, (50, 70), background=background)
    assert torch.equal(everywhere[some > 0], some[some > 0])


def test_maps_that_are_not_scaled_keep_their_values():
    scores = torch.tensor([[[[0.2, 0.4]]]])
    assert fused_labels(scores, (1, 2), background=0.25, scaled=False).tolist() == [[[0, 1]]]
    assert fused_labels(scores, (1, 2), background=0.15, scaled=False).tolist() == [[[1, 1]]]
    assert fused_labels(scores, (1, 2), background=0.15).tolist() == [[[0, 1]]]
