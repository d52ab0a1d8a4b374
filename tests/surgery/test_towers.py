"""Every image tower that open_clip lists: explained as the library's own forward, or refused by name."""

import copy
import json
import math
from dataclasses import replace
from functools import cache
from pathlib import Path

import open_clip
import pytest
import timm
import torch
from timm.models.vitamin import VitCfg, VitConvCfg

from common.errors import InvalidSetting
from surgery import RECIPES, Recipe, explain, load_backbone
from surgery.analysis import look_inside
from surgery.architectures import patch_size, why_not
from surgery.texts import Texts
from surgery.towers import OpenClipViT, ResNet

CONFIGS = {name: open_clip.get_model_config(name) for name in open_clip.list_models()}
TEXT = {"width": 32, "layers": 1, "heads": 1, "vocab_size": 50, "context_length": 8}
QK = Recipe(pairs=("qk",), ffn=True)
"""The dual path with CLIP's own attention: another way to walk the way of plain CLIP."""

REFUSED = {
    "captioning model": ["coca_"],
    "convnext.*convolutions": ["convnext_"],
    "fastvit.*convolutions": ["MobileCLIP2-S", "MobileCLIP-S"],
    "shifted windows": ["swin_"],
    "biases.*pairs of queries and keys": ["vit_relpos_"],
}
"""Why -> what the names of those that are refused for it begin with."""


def small(name: str) -> dict:
    """A model's own config with two blocks of 64 channels, on a grid of 2 x 3."""
    config = json.loads(json.dumps(CONFIGS[name]))
    vision, patch = config["vision_cfg"], patch_size(config["vision_cfg"])
    if isinstance(vision.get("layers"), list):
        vision |= {"layers": [1] * 4, "width": 8, "image_size": 64}
    else:
        vision["image_size"] = [2 * patch, 3 * patch]
    if isinstance(vision.get("layers"), int):
        vision |= {"layers": 2, "width": 64, "head_width": 32}
    options = ("pool_type", "no_causal_mask", "proj_bias", "norm_kwargs", "act_kwargs")
    text = {k: v for k, v in config["text_cfg"].items() if k in options}
    embed_dim = 64 if vision.get("timm_proj") == "none" else 32
    return config | {"embed_dim": embed_dim, "text_cfg": text | TEXT}


def shrunk(create):
    """timm's own `create_model`, two blocks deep and 64 channels wide."""

    def model(name, **options):
        if options.get("num_classes", 0) not in (0, 32):  # only what is asked for here
            raise AssertionError(name)
        depth = 1 if "mci" in name else 2
        options |= {"depth": depth, "img_size": (2 * STRIDE[name], 3 * STRIDE[name])}
        if "mci" not in name:  # its convolutions are as wide as its blocks
            options |= {"embed_dim": 64, "num_heads": 2}
        if "vitamin" in name:
            conv = VitConvCfg(norm_layer="layernorm2d", norm_eps=1e-6)
            stem = {"embed_dim": (8, 16, 64), "depths": (1, 1, 1), "stem_width": 8}
            options["embed_cfg"] = VitCfg(**stem, conv_cfg=conv, head_type="1d")
        return create(name, **options)

    return model


STRIDE = {
    config["vision_cfg"]["timm_model_name"]: patch_size(config["vision_cfg"])
    for config in CONFIGS.values()
    if "timm_model_name" in config["vision_cfg"]
}


def distinct() -> dict[str, list[str]]:
    """Models whose image towers differ when they are small -> all names of such a tower."""
    found: dict[str, list[str]] = {}
    for name, config in CONFIGS.items():
        if not why_not(config):
            kind = json.dumps([small(name)["vision_cfg"], config.get("quick_gelu", False)])
            found.setdefault(kind, []).append(name)
    return {names[0]: names for names in found.values()}


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """`build("PE-Core-B-16", attention="raw")`: a small network of this kind, weights all random."""
    folder: Path = tmp_path_factory.mktemp("configs")

    @cache
    def load(name, **options):
        path = folder / f"{name}.json"
        path.write_text(json.dumps(small(name)))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(timm, "create_model", shrunk(timm.create_model))
            backbone = load_backbone(path, **options)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for key, value in backbone.model.named_parameters():
                scale = 0.2 if value.ndim < 2 else 1 / math.sqrt(value[0].numel())
                value.add_(scale * torch.randn(value.shape, generator=generator))
                assert value.isfinite().all(), key
        return backbone

    return load


@pytest.fixture(scope="module")
def images():
    return lambda backbone, *size: torch.randn(
        2, 3, *(size or backbone.image_size), generator=torch.Generator().manual_seed(1)
    )


def close(given, expected, atol=2e-5):
    torch.testing.assert_close(given, expected, rtol=1e-4, atol=atol * float(expected.abs().max()))


def own_patches(visual, images):
    """Patch tokens in the joint space, by the library's own calls on its own tokens."""
    if hasattr(visual, "trunk"):
        tokens = visual.trunk.forward_features(images)[:, visual.trunk.num_prefix_tokens :]
        alone = visual.trunk.forward_head(tokens.flatten(0, 1)[:, None])
        return visual.head(alone).unflatten(0, tokens.shape[:2])
    options = {"indices": 1, "normalize_intermediates": True, "output_fmt": "NLC"}
    return visual.forward_intermediates(images, **options)["image_intermediates"][0] @ visual.proj


@pytest.mark.parametrize("name", distinct())
@torch.inference_mode()
def test_raw_is_the_librarys_own(name, build, images):
    plain = build(name, attention="raw")
    pictures = images(plain)
    visual = plain.model.visual
    tokens = plain.encode_image(pictures)
    close(tokens.class_token, visual(pictures))
    if not isinstance(plain.tower, ResNet):  # its pool has no other tokens
        close(tokens.patch_tokens, own_patches(visual, pictures))
    assert tokens.grid == plain.tower.grid(plain.image_size)
    assert patch_size(CONFIGS[name]["vision_cfg"]) == plain.patch_size[0] == plain.patch_size[1]
    # And at another size, not square, where the library can't follow:
    rows, columns = plain.patch_size
    larger = images(plain, 3 * rows, 2 * columns)
    tokens = plain.encode_image(larger)
    # The new path, with CLIP's own attention, in every block. Clones: it writes in place.
    for released in ("clip", "released"):
        other = build(name, attention=QK, blocks=99, class_token=released).encode_image(larger)
        close(other.patch_tokens, tokens.patch_tokens)
        close(other.class_token, tokens.class_token)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_name_is_supported_or_refused_with_a_reason(name):
    expected = [
        reason for reason, starts in REFUSED.items() for start in starts if name.startswith(start)
    ]
    reason = why_not(CONFIGS[name])
    if not expected:
        assert reason is None
        assert any(name in names for names in distinct().values())
    else:
        with pytest.raises(InvalidSetting, match=f"^{name} can't be explained.*{expected[0]}"):
            load_backbone(name, "/no/such/weights.pt")  # before weights are read


FAMILIES = {
    "ViT-M-16-alt": "class",
    "ViT-L-14-CLIPA": "mean",
    "EVA02-B-16": "class",
    "EVA02-E-14": "class",
    "PE-Core-B-16": "attention",
    "ViT-B-16-SigLIP": "attention",
    "vit_medium_patch16_gap_256": "mean",
    "MobileCLIP2-L-14": "class",
}
"""One model of each kind of blocks -> what its image feature is made of."""


@pytest.mark.parametrize(("name", "pooling"), FAMILIES.items())
def test_recipes_are_defined_or_refused(name, pooling, build, images):
    backbone = build(name)
    assert backbone.tower.pooling == pooling
    pictures = images(backbone)
    plain = backbone.with_attention("raw").encode_image(pictures)
    text = torch.randn(3, backbone.embed_dim)
    for recipe, row in RECIPES.items():
        row = replace(row, large=None, sink_channels=(3, 9))
        if row.attention_blocks:
            row = replace(row, attention_blocks=(0, 1))
        if row.similarity_block:
            row = replace(row, similarity_block=0, smoothing_block=0, summed_blocks=(0, 1))
            if pooling != "class":
                reason = "reads the class token.*not of a class"
                with pytest.raises(InvalidSetting, match=reason):
                    backbone.with_attention(row)
                continue
        reader = backbone.with_attention(row)
        tokens = reader.encode_image(pictures, text)
        assert tokens.patch_tokens.shape == plain.patch_tokens.shape
        assert tokens.patch_tokens.isfinite().all(), recipe
        if recipe != "raw":
            assert not torch.allclose(tokens.patch_tokens, plain.patch_tokens, atol=1e-3), recipe
        if row.position != "none" and "kk_all" not in row.pairs:
            close(tokens.class_token, plain.class_token)
        with torch.inference_mode():  # where it writes in place
            close(reader.encode_image(pictures, text).patch_tokens, tokens.patch_tokens)
    exact = copy.deepcopy(backbone).double().encode_image(pictures.double())
    close(exact.patch_tokens.float(), backbone.encode_image(pictures).patch_tokens)
    assert exact.class_token.dtype == torch.float64
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = backbone.encode_image(pictures)
    close(rounded.patch_tokens, backbone.encode_image(pictures).patch_tokens, 5e-2)
    close(rounded.class_token, plain.class_token, 5e-2)


def test_values_alone_make_the_attention_of_one_token(build, images):
    """Of one patch, nothing but itself can be seen: v-v attention and CLIP's own are the same."""
    for name in ("ViT-B-16-SigLIP", "PE-Core-bigG-14-448"):
        backbone = build(name, attention=Recipe(pairs=("vv",), ffn=True), blocks=99)
        one = images(backbone, *backbone.patch_size)
        tokens = backbone.encode_image(one)
        plain = backbone.with_attention("raw").encode_image(one)
        close(tokens.patch_tokens, plain.patch_tokens)
        close(tokens.patch_tokens[:, 0], plain.class_token)  # and the pooling sees it only


def test_rotary_positions_follow_the_grid(build, images):
    backbone = build("EVA02-L-14-336", attention="raw")
    visual = backbone.model.visual
    with torch.no_grad():  # timm resizes the others in a way of its own
        kept = visual.trunk.pos_embed.clone()
        visual.trunk.pos_embed.zero_()
        pictures = images(backbone, 56, 28)
        tokens = backbone.encode_image(pictures)
        visual.set_input_size((56, 28))
        close(tokens.class_token, visual(pictures))
        visual.set_input_size(tuple(backbone.image_size))
        visual.trunk.pos_embed.copy_(kept)


@pytest.mark.parametrize("name", ["ViT-B-16-SigLIP", "ViT-L-14-CLIPA", "EVA02-B-16"])
def test_methods_that_read_a_class_token_need_one(name, build, images):
    backbone = build(name)
    pictures, texts = images(backbone), Texts(torch.randn(3, backbone.embed_dim))
    found = explain(backbone, pictures, texts, method="grad_cam")
    assert found.shape == (2, 3, 2, 3)
    assert found.abs().max() > 0
    if name == "EVA02-B-16":
        for method in ("bi_modal", "legrad"):
            assert explain(backbone, pictures, texts, method=method).max() > 0
        with pytest.raises(InvalidSetting, match="'plrp' is defined for a ViT of open_clip's own"):
            explain(backbone, pictures, texts, method="plrp")
        assert look_inside(backbone, pictures).attention["raw"].shape == (2, 7, 7)
    else:
        for method in ("bi_modal", "legrad", "gscorecam"):
            with pytest.raises(InvalidSetting, match=f"'{method}'"):
                explain(backbone, pictures, texts, method=method)
        with pytest.raises(InvalidSetting, match="add to the class token; this image tower makes"):
            look_inside(backbone, pictures)


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_released_class_token_is_none_of_a_patch(recipe, build, images):
    row = replace(RECIPES[recipe], large=None, sink_channels=())
    if row.attention_blocks:
        row = replace(row, attention_blocks=(0, 1))
    if row.similarity_block:
        row = replace(row, similarity_block=0, smoothing_block=0, summed_blocks=(0, 1))
    backbone = build("ViT-M-16-alt", class_token="released").with_attention(row)
    tokens = backbone.encode_image(images(backbone), torch.randn(3, backbone.embed_dim))
    assert not torch.allclose(tokens.class_token, tokens.patch_tokens[:, 0], rtol=1e-3)


def test_blocks_with_norms_of_their_own(tmp_path, images):
    config = small("ViT-B-16")
    options = ("qk_norm", "scale_heads", "scale_attn_inner", "scale_attn", "scale_fc")
    config["vision_cfg"] |= dict.fromkeys(options, True) | {"ls_init_value": 0.5}
    path = tmp_path / "custom.json"
    path.write_text(json.dumps(config))
    plain, other = load_backbone(path, attention="raw"), load_backbone(path, attention=QK, blocks=2)
    assert isinstance(plain.tower, OpenClipViT)
    for network in (plain, other):
        torch.manual_seed(0)
        for value in network.model.parameters():
            value.data += 0.1 * torch.randn_like(value)
    pictures = images(plain)
    tokens = plain.encode_image(pictures)
    close(tokens.class_token, plain.model.visual(pictures))
    close(other.encode_image(pictures).patch_tokens, tokens.patch_tokens)
    config["vision_cfg"]["scaled_cosine_attn"] = True
    path.write_text(json.dumps(config))
    with pytest.raises(InvalidSetting, match=r"custom\.json can't be explained.*scaled cosine"):
        load_backbone(path)


def test_siglip_has_a_bias_and_texts(build):
    backbone = build("ViT-B-16-SigLIP2")
    with torch.no_grad():
        backbone.model.logit_bias.fill_(-9.5)
    assert backbone.logit_bias == -9.5
    assert build("ViT-B-16").logit_bias is None
    tokens = torch.randint(0, 50, (3, 8))
    close(backbone.encode_text(tokens), backbone.model.encode_text(tokens))
