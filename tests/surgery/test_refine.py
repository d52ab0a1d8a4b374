"""Refinements of maps, against the released code of those who use them."""

import pytest
import torch
import torch.nn.functional as F

from surgery.refine import Affinities, pamr


@pytest.fixture
def known(reference):
    return reference("segmentation")


def enlarged(maps):
    return F.interpolate(maps, size=(96, 96), mode="bilinear", align_corners=False)


def test_pamr_as_in_its_repositories(known, reference):
    image, maps = reference("inputs")["images_vit"][:1], known["pamr_input"]
    for found, stored in (
        (pamr(image, maps), "pamr_from_grid"),
        (pamr(image, enlarged(maps[:, :2])), "pamr_image0"),
        (
            pamr(image, enlarged(maps[:, :2]), steps=3, dilations=(1, 2, 4, 8, 12, 24)),
            "pamr_many_dilations_image0",
        ),
    ):
        torch.testing.assert_close(found, known[stored], rtol=0, atol=5e-6)


def test_pamr_of_some_maps_now_and_others_later(known, reference):
    images = reference("inputs")["images_vit"][:2, :, :64]
    maps = torch.cat([known["pamr_input"], known["pamr_input"].flip(3)])
    together = pamr(images, maps)
    assert together.shape == (2, 4, 64, 96)
    for i in range(2):
        one = Affinities.of(images[i : i + 1])
        alone = torch.cat([one.refine(part) for part in maps[i : i + 1].split(3, dim=1)], dim=1)
        torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=1e-6)


def test_pamr_under_autocast_and_in_64_bits(known, reference):
    image, maps = reference("inputs")["images_vit"][:1], known["pamr_input"]
    with torch.autocast("cpu", torch.bfloat16):
        low = pamr(image, maps)
    assert torch.equal(low, pamr(image, maps))
    torch.testing.assert_close(pamr(image.double(), maps.double()).float(), low)


def test_pamr_refuses_what_it_cannot_do(reference):
    images = reference("inputs")["images_vit"]
    with pytest.raises(ValueError, match="dilations from 1 on"):
        pamr(images, torch.zeros(3, 1, 2, 2), dilations=())
    with pytest.raises(ValueError, match=r"expected \[3, T, h, w\], given \[1, 1, 2, 2\]"):
        pamr(images, torch.zeros(1, 1, 2, 2))
