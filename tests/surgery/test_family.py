"""Other training-free methods as recipes, against their own repositories' numbers."""

from dataclasses import replace

import pytest
import torch

from common.errors import InvalidSetting
from surgery import RECIPES, load_backbone

FULL = {"residual": True, "ffn": True}
BARE = {"residual": False, "ffn": False}
SCLIP, CLEARCLIP, NACLIP, MASKCLIP, PEARL, SFP = (
    RECIPES[name] for name in ("sclip", "clearclip", "naclip", "maskclip", "pearl", "sfp")
)
CASES = {
    "sclip": SCLIP,
    "sclip_no_residual_no_ffn": replace(SCLIP, **BARE),
    "clearclip": CLEARCLIP,
    "clearclip_with_residual_ffn": replace(CLEARCLIP, **FULL),
    "maskclip": MASKCLIP,
    "maskclip_no_residual_no_ffn": replace(MASKCLIP, **BARE),
    "vanilla_no_residual_no_ffn": replace(CLEARCLIP, pairs=("qk",)),
    "naclip": NACLIP,
    "naclip_std1": replace(NACLIP, neighbour_std=1.0),
    "naclip_with_residual_ffn": replace(NACLIP, **FULL),
    "naclip_kk_only": replace(NACLIP, neighbour_std=None),
    "cliptrase": RECIPES["cliptrase"],
    "pearl": PEARL,
    "pearl_alpha03": replace(PEARL, alpha=0.3),
    "pearl_no_kk": replace(PEARL, alpha=0.0),
    "pearl_with_residual_ffn": replace(PEARL, **FULL),
    "cliper": RECIPES["cliper"],
    "scclip": RECIPES["sc_clip"],
    "sfp": SFP,
    "sfp_lof": replace(SFP, outliers="density"),
    "sfp_factor06": replace(SFP, outlier_factor=0.6),
}


@pytest.fixture
def expected(reference):
    """The patch tokens that each repository's code answers, by name."""
    return {**reference("family"), **reference("newer")}


@pytest.mark.parametrize("name", CASES)
def test_as_in_its_repository(name, reference, expected, network):
    tokens = network("vit", attention=CASES[name]).encode_image(reference("inputs")["images_vit"])
    known = ~expected[name].isnan().any(dim=2)  # of one image, SFP's own code makes nothing but NaN
    assert known.sum() >= 2 * known.shape[1]
    found = tokens.patch_tokens
    assert found.isfinite().all()
    torch.testing.assert_close(found[known], expected[name][known], rtol=0, atol=2e-5)


LARGE = {
    "sclip": "sclip",
    "clearclip": "clearclip",
    "naclip": "naclip",
    "cliptrase": "cliptrase",
    "pearl": "pearl",
    "cliper": "cliper",
    "sc_clip": "scclip",
    "sfp": "sfp",
}


@pytest.mark.parametrize("name", LARGE)
def test_position_embeddings_as_in_its_repository(name, reference, expected, network):
    stored = expected[f"{LARGE[name]}_large"]
    images = reference("inputs")["images_vit_large"][: len(stored)]
    tokens = network("vit", attention=name).encode_image(images)
    torch.testing.assert_close(tokens.patch_tokens, stored, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", LARGE)
def test_an_image_has_its_tokens_in_any_batch_and_shape(name, reference, network):
    images = reference("inputs")["images_vit"]
    wide = torch.cat([images, images[..., :32]], dim=3)
    backbone = network("vit", attention=name)
    together, alone = (backbone.encode_image(part).patch_tokens for part in (wide, wide[1:2]))
    assert together.shape == (3, 48, 64)
    assert together.isfinite().all()
    torch.testing.assert_close(together[1:2], alone, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", LARGE)
def test_networks_in_16_bits(name, reference, network, folder):
    images = reference("inputs")["images_vit"]
    low = load_backbone(folder / "vit.json", folder / "vit.safetensors", attention=name).bfloat16()
    tokens = (
        b.encode_image(images).patch_tokens.float() for b in (network("vit", attention=name), low)
    )
    assert torch.cosine_similarity(*tokens, dim=-1).mean() > 0.99


def test_blocks_that_there_are_not(folder):
    short = replace(RECIPES["sc_clip"], summed_blocks=(3, 12))
    with pytest.raises(InvalidSetting, match=r"reads blocks up to 11 .* has 12 blocks"):
        load_backbone(folder / "vit.json", attention=short)
    with pytest.raises(InvalidSetting, match="a ResNet has none"):
        load_backbone(folder / "rn.json", attention="sc_clip")


def test_gem(reference, network):
    images, expected = reference("inputs")["images_vit"], reference("gem")
    own = network("vit", attention="gem").encode_image(images)
    released = network("vit", attention="gem", class_token="released").encode_image(images)
    gem, plain = expected["image_tokens_gem"], expected["image_tokens_ori"]
    for given, stored in (
        (own.patch_tokens, gem[:, 1:]),
        (released.patch_tokens, gem[:, 1:]),
        (released.class_token, gem[:, 0]),
        (own.class_token, plain[:, 0]),
    ):
        torch.testing.assert_close(given, stored, rtol=0, atol=2e-5)


def test_gem_heat_map(reference, network):
    from surgery import similarity, similarity_map

    images, expected = reference("inputs")["images_vit"][:1], reference("gem")
    tokens = network("vit", attention="gem").encode_image(images)
    scores = similarity(tokens.patch_tokens, reference("vit")["text_features"][:3])
    maps = similarity_map(scores, tokens.grid, (96, 96), order="paper")[0]
    torch.testing.assert_close(maps, expected["heatmap_image0_texts012"], rtol=0, atol=5e-5)
