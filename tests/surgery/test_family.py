"""Other training-free methods as recipes, against their own repositories' numbers."""

from dataclasses import replace

import pytest
import torch

from common.errors import InvalidSetting
from surgery import RECIPES, load_backbone
from surgery.agreement import cell_labels
from surgery.attention import for_depth
from surgery.smoothing import outliers
from surgery.towers import Visitor
from tests.surgery.recipes import OURS

FULL = {"residual": True, "ffn": True}
BARE = {"residual": False, "ffn": False}
SCLIP, CLEARCLIP, NACLIP, MASKCLIP, PEARL, SFP, RESCLIP = (
    RECIPES[name]
    for name in ("sclip", "clearclip", "naclip", "maskclip", "pearl", "sfp", "resclip")
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
    "naclip_neighbours_only": replace(NACLIP, pairs=("near",)),
    "resclip": RESCLIP,
    "resclip_voc21": replace(
        RESCLIP, combine=(1.4, 0.6), label_share=0.7, label_scale=2.2, label_threshold=0.5
    ),
    "resclip_rcs_only": replace(RESCLIP, label_share=0),
    "resclip_sfr_only": replace(RESCLIP, pairs=("kk",), combine="mean", attention_blocks=None),
    "cliptrase": RECIPES["cliptrase"],
    "pearl": PEARL,
    "pearl_alpha03": replace(PEARL, alpha=0.3),
    "pearl_no_kk": replace(PEARL, alpha=0.0),
    "pearl_svd": replace(PEARL, alignment_rounds=None),
    "pearl_with_residual_ffn": replace(PEARL, **FULL),
    "cliper": RECIPES["cliper"],
    "scclip": RECIPES["sc_clip"],
    "sfp": SFP,
    "sfp_l2": replace(SFP, outliers="length"),
    "sfp_lof": replace(SFP, outliers="density"),
    "sfp_factor06": replace(SFP, outlier_factor=0.6),
    "rf_clip": OURS["rf_clip"],
    "rf_clip_no_denoising": replace(OURS["rf_clip"], sink_channels=()),
    "rf_clip_refocused": OURS["rf_clip_refocused"],
}
FILES = ("family", "newer", "resclip", "rf_clip", "pearl", "cliptrase", "cells")


@pytest.fixture
def expected(reference):
    """The patch tokens that each repository's code answers, by name."""
    return {key: values for name in FILES for key, values in reference(name).items()}


@pytest.mark.parametrize("name", CASES)
def test_as_in_its_repository(name, reference, expected, network, texts):
    images = reference("inputs")["images_vit"]
    tokens = network("vit", attention=CASES[name]).encode_image(images, texts=texts)
    known = ~expected[name].isnan().any(dim=2)  # of one image, SFP's own code makes nothing but NaN
    assert known.sum() >= 2 * known.shape[1]
    found = tokens.patch_tokens
    assert found.isfinite().all()
    torch.testing.assert_close(found[known], expected[name][known], rtol=0, atol=2e-5)


LARGE = {
    "sclip": "sclip",
    "clearclip": "clearclip",
    "naclip": "naclip",
    "resclip": "resclip",
    "cliptrase": "cliptrase",
    "pearl": "pearl",
    "cliper": "cliper",
    "sc_clip": "scclip",
    "sfp": "sfp",
    "rf_clip": "rf_clip",
}


@pytest.mark.parametrize("name", LARGE)
def test_position_embeddings_as_in_its_repository(name, reference, expected, network, texts):
    stored = expected[f"{LARGE[name]}_large"]
    images = reference("inputs")["images_vit_large"][: len(stored)]
    tokens = network("vit", attention=OURS[name]).encode_image(images, texts=texts)
    torch.testing.assert_close(tokens.patch_tokens, stored, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", RECIPES)
def test_an_image_has_its_tokens_in_any_batch_and_shape(name, reference, network, texts):
    images = reference("inputs")["images_vit"]
    wide = torch.cat([images, images[..., :32]], dim=3)
    backbone = network("vit", attention=OURS[name])
    for pixels, grid in ((wide, (6, 8)), (wide.transpose(2, 3), (8, 6))):
        tokens = backbone.encode_image(pixels, texts=texts)
        assert tokens.grid == grid
        assert tokens.patch_tokens.shape == (3, 48, 64)
        assert tokens.patch_tokens.isfinite().all()
        for i in range(3):
            alone = backbone.encode_image(pixels[i : i + 1], texts=texts)
            for given, same in (
                (tokens.patch_tokens[i], alone.patch_tokens[0]),
                (tokens.class_token[i], alone.class_token[0]),
            ):
                torch.testing.assert_close(given, same, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", LARGE)
def test_networks_in_16_bits(name, reference, network, folder, texts):
    images = reference("inputs")["images_vit"]
    own = OURS[name]
    low = load_backbone(folder / "vit.json", folder / "vit.safetensors", attention=own).bfloat16()
    tokens = (
        b.encode_image(images, texts=texts).patch_tokens.float()
        for b in (network("vit", attention=own), low)
    )
    assert torch.cosine_similarity(*tokens, dim=-1).mean() > 0.99


class Seen(Visitor):
    """The cells that enter the last block, and what the one before it saw."""

    def enter(self, step):
        self.x = step.x[:, 1:].clone()

    def leave(self, step):
        if step.index == 10:
            self.weights = step.weights().mean(dim=1)


@pytest.mark.parametrize(
    ("stored", "how", "factor"),
    [
        ("scclip", "density", 1.5),
        ("sfp_lof", "density", 1.5),
        ("sfp", "class", 1.5),
        ("sfp_factor06", "class", 0.6),
        ("sfp_l2", "length", 1.5),
        ("scclip_large", "density", 1.5),
        ("sfp_large", "class", 1.5),
    ],
)
def test_which_cells_are_replaced(stored, how, factor, reference, expected, network):
    size = "_large" if stored.endswith("large") else ""
    seen = Seen()
    network("vit", attention="sc_clip").walk(reference("inputs")[f"images_vit{size}"], seen)
    found = outliers(how, seen.x, seen.weights, factor)
    for i, cells in enumerate(expected[f"{stored}_outliers"]):
        assert set(found[i].nonzero().flatten().tolist()) == {*cells.tolist()} - {-1}


@pytest.mark.parametrize(
    ("stored", "size", "changes", "threshold"),
    [
        ("resclip_labels", "", {}, 0.1),
        ("resclip_voc21_labels", "", {"combine": (1.4, 0.6)}, 0.5),
        ("resclip_sfr_only_labels", "", {"pairs": ("kk",), "attention_blocks": None}, 0.1),
        ("resclip_large_labels", "_large", {}, 0.1),
    ],
)
def test_labels_of_the_first_pass(
    stored, size, changes, threshold, reference, expected, network, texts
):
    first = replace(RESCLIP, **{"label_share": 0, "combine": (0.8, 1.2), **changes})
    first = replace(first, combine="mean") if "pairs" in changes else first
    images = reference("inputs")[f"images_vit{size}"]
    tokens = network("vit", attention=first).encode_image(images)
    found = cell_labels(tokens.patch_tokens, images, texts, tokens.grid, threshold)
    assert torch.equal(found, expected[stored].flatten(1))


def test_class_tokens_of_their_repositories(reference, expected, network):
    images = reference("inputs")["images_vit"]
    for name, attention, released in (
        ("cliptrase_class_token", "cliptrase", True),
        ("rf_clip_class_token", OURS["rf_clip"], False),
    ):
        backbone = network(
            "vit", attention=attention, class_token="released" if released else "clip"
        )
        found = backbone.encode_image(images).class_token
        torch.testing.assert_close(found, expected[name], rtol=0, atol=2e-5)


def test_defaults_are_those_of_the_authors(expected):
    sc_clip, sfp, resclip = (RECIPES[name] for name in ("sc_clip", "sfp", "resclip"))
    for recipe, stored in ((sc_clip, "scclip_params"), (sfp, "sfp_params")):
        own = (recipe.similarity_block, recipe.smoothing_block, *recipe.summed_blocks)
        assert own == tuple(expected[stored])
    assert resclip.attention_blocks == tuple(expected["resclip_rcs_blocks"])
    assert OURS["rf_clip"].sink_channels == tuple(expected["rf_clip_channels"].tolist())
    assert OURS["rf_clip"].sink_factor == float(expected["rf_clip_params"][0])


def test_blocks_that_there_are_not(folder):
    short = replace(RECIPES["sc_clip"], summed_blocks=(3, 12))
    with pytest.raises(InvalidSetting, match=r"summed_blocks: .* blocks 3 to 11 .* has 12 blocks"):
        load_backbone(folder / "vit.json", attention=short)
    deep = replace(RECIPES["resclip"], attention_blocks=(9, 12))
    with pytest.raises(InvalidSetting, match=r"attention_blocks: .* blocks 9 to 11"):
        load_backbone(folder / "vit.json", attention=deep)
    for name in ("sc_clip", "cliper", "rf_clip"):
        with pytest.raises(InvalidSetting, match="a ResNet has none"):
            load_backbone(folder / "rn.json", attention=name)


def test_channels_are_those_of_a_width(folder):
    with pytest.raises(InvalidSetting, match=r"sink_channels: .* width 768 and 1024 only, .* 128"):
        load_backbone(folder / "vit.json", attention="rf_clip")
    with pytest.raises(InvalidSetting, match=r"sink_channels: there is none of \[5, 128\]"):
        load_backbone(
            folder / "vit.json", attention=replace(RECIPES["rf_clip"], sink_channels=(5, 128))
        )


def test_what_is_changed_of_a_recipe_holds_for_deep_networks_too():
    changed = replace(RECIPES["sc_clip"], summed_blocks=(9, 12), outlier_factor=2.0)
    assert for_depth(RECIPES["sc_clip"], 12) == RECIPES["sc_clip"]
    assert for_depth(RECIPES["sc_clip"], 24).similarity_block == 16
    deep = for_depth(changed, 24)
    assert (deep.similarity_block, deep.summed_blocks, deep.class_share) == (16, (9, 12), 0.1)
    assert deep.outlier_factor == 2.0


def test_texts_where_they_are_needed(reference, network, texts):
    images = reference("inputs")["images_vit"]
    with pytest.raises(InvalidSetting, match="texts"):
        network("vit", attention="resclip").encode_image(images)
    plain = network("vit", attention="naclip")
    same = plain.encode_image(images).patch_tokens
    assert torch.equal(plain.encode_image(images, texts=texts).patch_tokens, same)


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
