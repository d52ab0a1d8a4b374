"""Refinements of maps, against the released code of those who use them."""

import pytest
import torch
import torch.nn.functional as F

from surgery import similarity
from surgery.refine import Affinities, pamr, tlp


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


@pytest.mark.parametrize(("name", "side"), [("pearl", 96), ("pearl_large", 144)])
def test_tlp_as_in_pearl(name, side, known, network, reference):
    images = reference("inputs")["images_vit" if side == 96 else "images_vit_large"][:1]
    text = reference("vit")["text_features"][:3]
    tokens = network("vit", attention="pearl").encode_image(images)
    cosines = similarity(tokens.patch_tokens, text).transpose(1, 2).unflatten(2, tokens.grid)
    maps = F.interpolate(cosines, size=(side, side), mode="bilinear")[0]
    expected = known[f"{name.replace('pearl', 'pearl_tlp')}_image0"][0]
    torch.testing.assert_close(tlp(images, maps, text, grid=80), expected, rtol=0, atol=5e-6)


@pytest.mark.parametrize("size", [(90, 200), (1, 30), (7, 7)])
def test_tlp_of_any_size(size):
    generator = torch.Generator().manual_seed(0)
    image, text = torch.randn(1, 3, *size, generator=generator), torch.eye(2, 8)
    maps = torch.rand(2, *size, generator=generator)
    found = tlp(image, maps, text)
    assert found.shape == maps.shape
    assert found.isfinite().all()
    flat = torch.full_like(maps, 0.25)
    torch.testing.assert_close(tlp(image, flat, text), flat, rtol=0, atol=1e-6)
