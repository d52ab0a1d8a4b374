"""Other training-free methods as recipes, against their own repositories' numbers."""

from dataclasses import replace

import pytest
import torch

from surgery import RECIPES

FULL = {"residual": True, "ffn": True}
BARE = {"residual": False, "ffn": False}
SCLIP, CLEARCLIP, NACLIP, MASKCLIP, PEARL = (
    RECIPES[name] for name in ("sclip", "clearclip", "naclip", "maskclip", "pearl")
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
}


@pytest.fixture
def expected(reference):
    """The patch tokens that each repository's code answers, by name."""
    return {**reference("family"), **reference("newer")}


@pytest.mark.parametrize("name", CASES)
def test_as_in_its_repository(name, reference, expected, network):
    tokens = network("vit", attention=CASES[name]).encode_image(reference("inputs")["images_vit"])
    torch.testing.assert_close(tokens.patch_tokens, expected[name], rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["sclip", "clearclip", "naclip", "cliptrase", "pearl"])
def test_position_embeddings_as_in_its_repository(name, reference, expected, network):
    stored = expected[f"{name}_large"]
    images = reference("inputs")["images_vit_large"][: len(stored)]
    tokens = network("vit", attention=name).encode_image(images)
    torch.testing.assert_close(tokens.patch_tokens, stored, rtol=0, atol=2e-5)


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
