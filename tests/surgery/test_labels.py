"""The end of a segmentation, against SCLIP's own, and rule by rule against dense computations."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from surgery import labels, similarity
from surgery.labels import Rules, label_maps
from surgery.refine import Affinities
from surgery.windows import Window, cut_windows

CLASSES = torch.tensor([0, 0, 1, 2, 2, 3, 4, 5, 6])
SIZE = (50, 70)


@pytest.fixture(scope="module")
def seen(network, reference):
    """Windows of the large images, whole or cut, and their cosines: as `window_similarities` has them."""
    backbone = network("vit", attention="sclip")
    images, text = reference("inputs")["images_vit_large"], reference("vit")["text_features"]

    def see(window, stride):
        boxes = cut_windows((144, 144), window, stride)
        found = []
        for box in boxes:
            tokens = backbone.encode_image(box.of(images))
            cosines = similarity(tokens.patch_tokens, text).transpose(1, 2)
            found.append(cosines.unflatten(2, tokens.grid))
        return [list(of) for of in zip(*found, strict=True)], [boxes] * 3

    settings = reference("segmentation")["segment_settings"].tolist()
    return see(int(settings[3]), int(settings[4])), see(None, None)


def refiner(images):
    return lambda i: partial(
        lambda known, maps: known.refine(maps[None])[0],
        Affinities.of(F.interpolate(images[i : i + 1], size=SIZE, mode="bilinear")),
    )


@pytest.mark.parametrize("budget", [1, 1 << 27])
@pytest.mark.parametrize(
    ("stored", "whole", "area", "refined"),
    [
        ("segment_prediction", False, False, False),
        ("segment_prediction_area", False, True, False),
        ("segment_prediction_pamr", False, True, True),
        ("segment_prediction_whole", True, True, False),
    ],
)
def test_as_sclips_own(stored, whole, area, refined, budget, seen, reference, monkeypatch):
    monkeypatch.setattr(labels, "_NUMBERS_KEPT", budget)
    monkeypatch.setattr(labels, "_NUMBERS_AT_ONCE", 4 * budget)
    scores, boxes = seen[whole]
    known = reference("segmentation")
    scale, threshold, share, *_ = known["segment_settings"].tolist()
    rules = Rules(CLASSES, scale, threshold, share if area else None)
    refine = refiner(reference("inputs")["images_vit_large"]) if refined else None
    found = label_maps(scores, boxes, [(144, 144)] * 3, [SIZE] * 3, (16, 16), rules, refine)
    assert torch.equal(found, known[stored].long())


def grid(words, height=4, width=5, seed=0):
    return torch.randn(words, height, width, generator=torch.Generator().manual_seed(seed)) / 10


def labelled(scores, rules, size=SIZE, image=(32, 40)):
    whole = [Window(0, 0, *image)]
    return label_maps([[scores]], [whole], [image], [size], (8, 8), rules)[0]


def test_float16_has_ties_and_the_first_wins():
    scores, values = 0.2 + grid(30) / 50, torch.arange(30)
    dense = F.interpolate(scores[None], size=SIZE, mode="bilinear")[0]
    likely = (40 * dense.half()).softmax(0)
    expected = likely.argmax(0).where(likely.amax(0) >= torch.tensor(0.036).half(), 0)
    found = labelled(scores, Rules(values, 40.0, 0.036, half=True))
    assert (found == expected).float().mean() > 0.999
    wide = labelled(scores, Rules(values, 40.0, 0.036))
    assert 0.5 < (found == wide).float().mean() < 1


def test_small_objects_give_way_to_the_next_likely():
    values = torch.tensor([1, 2, 3, 0])
    scores = torch.tensor(
        [[0.9, 0.9, 0.9, 0.1], [0.1, 0.2, 0.1, 0.9], [0, 0, 0, 0], [0, 0, 0, 0.3]]
    )
    rules = partial(Rules, values, 10.0)
    row = scores[:, None]
    keep = partial(labelled, row, size=(1, 4), image=(8, 32))
    assert keep(rules()).tolist() == [[1, 1, 1, 2]]
    assert keep(rules(area=0.24)).tolist() == [[1, 1, 1, 2]]
    assert keep(rules(area=0.25)).tolist() == [[1, 1, 1, 0]]  # a share of that is not enough
    assert keep(rules(area=1.0)).tolist() == [[0, 0, 0, 0]]


def test_a_whole_image_by_way_of_its_size():
    scores, values = grid(9), torch.arange(9)
    stretched = F.interpolate(scores[None], size=(37, 44), mode="bilinear")
    found = labelled(scores, Rules(values, by_image_size=True), image=(37, 44))
    expected = F.interpolate(stretched, size=SIZE, mode="bilinear")[0].argmax(0)
    assert torch.equal(found, expected)
    at_once = labelled(scores, Rules(values), image=(37, 44))
    assert torch.equal(at_once, F.interpolate(scores[None], SIZE, mode="bilinear")[0].argmax(0))
    assert not torch.equal(found, at_once)
