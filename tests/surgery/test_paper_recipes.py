"""The paper's ablations and settings as recipes, against plain torch over open_clip's own modules."""

import pytest
import torch
import torch.nn.functional as F

from common.errors import InvalidSetting
from surgery import load_backbone

CLOSE = {"rtol": 0, "atol": 2e-5}


def unit(x: torch.Tensor) -> torch.Tensor:
    return x / (x.norm(dim=-1, keepdim=True) + 1e-6)


def heads(module, x: torch.Tensor) -> list[torch.Tensor]:
    """q, k, v [B, heads, L, d] of a ViT's attention."""
    parts = F.linear(x, module.in_proj_weight, module.in_proj_bias).chunk(3, dim=-1)
    return [p.unflatten(-1, (module.num_heads, -1)).transpose(1, 2) for p in parts]


def attended(module, x: torch.Tensor, which: str) -> torch.Tensor:
    q, k, v = heads(module, x)
    if which == "identity":
        seen = v
    else:
        asks, keys = {"qk": (q, k), "vv": (v, v)}[which]
        seen = (asks @ keys.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1) @ v
    return module.out_proj(seen.transpose(1, 2).flatten(2))


@torch.no_grad()
def row(backbone, images, *, last, pair="vv", single=False, attention=True, ffn=None):
    """Patch tokens of one row of Table 4: the new path over the last blocks, written out."""
    visual = backbone.model.visual
    x = visual.conv1(images).flatten(2).transpose(1, 2)
    token = visual.class_embedding.expand(len(x), 1, -1)
    x = visual.ln_pre(torch.cat([token, x], 1) + visual.positional_embedding)
    blocks = visual.transformer.resblocks
    y = None
    for index, block in enumerate(blocks):
        if index >= len(blocks) - last:
            y = x.clone() if y is None else y
            if attention:
                y = y + attended(block.attn, block.ln_1(y if single else x), pair)
            if ffn == "own":
                y = y + block.mlp(block.ln_2(y))
        x = x + attended(block.attn, block.ln_1(x), "qk")
        fed = block.mlp(block.ln_2(x))
        x = x + fed
        if y is not None and ffn == "original":
            y = y + fed
    return (visual.ln_post(y) @ visual.proj)[:, 1:], (visual.ln_post(x) @ visual.proj)[:, 0]


ROWS = {
    "surgery_last": {"last": 1, "ffn": "own"},
    "surgery_single_path_ffn": {"last": 6, "single": True, "ffn": "own"},
    "surgery_ffn": {"last": 6, "ffn": "own"},
    "surgery_ffn_only": {"last": 6, "attention": False, "ffn": "original"},
    "surgery": {"last": 6},
    "maskclip_authors": {"last": 1, "pair": "identity"},
}


@pytest.mark.parametrize("name", ROWS)
def test_rows_of_table_4(name, reference, network):
    images = reference("inputs")["images_vit"]
    tokens = network("vit", attention=name).encode_image(images)
    patches, class_token = row(network("vit"), images, **ROWS[name])
    torch.testing.assert_close(tokens.patch_tokens, patches, **CLOSE)
    torch.testing.assert_close(tokens.class_token, class_token, **CLOSE)


@torch.no_grad()
def pool(backbone, images, *, positions: bool):
    """Tokens that CLIP's attention pool reads, [B, 1 + N, D], and the pool."""
    visual = backbone.model.visual
    x = visual.layer4(visual.layer3(visual.layer2(visual.layer1(visual.stem(images)))))
    x = x.flatten(2).transpose(1, 2)
    x = torch.cat([x.mean(1, keepdim=True), x], 1)
    return x + visual.attnpool.positional_embedding * positions, visual.attnpool


def test_the_setting_for_resnets(reference, network):
    images = reference("inputs")["images_rn"]
    x, attnpool = pool(network("rn"), images, positions=True)
    v = attnpool.v_proj(x).unflatten(-1, (attnpool.num_heads, -1)).transpose(1, 2)
    logits = unit(v) @ unit(v).transpose(-2, -1) * 8 * v.shape[-1] ** -0.5
    expected = attnpool.c_proj((logits.softmax(-1) @ v).transpose(1, 2).flatten(2))[:, 1:]
    tokens = network("rn", attention="surgery_resnet").encode_image(images)
    torch.testing.assert_close(tokens.patch_tokens, expected, rtol=0, atol=2e-4)
    plain = network("rn").encode_image(images)
    assert (plain.patch_tokens - expected).abs().max() > 1e-3


def test_tai_dpt_has_no_positions(reference, network):
    images = reference("inputs")["images_rn"]
    x, attnpool = pool(network("rn"), images, positions=False)
    tokens = network("rn", attention="tai_dpt").encode_image(images)
    values = attnpool.c_proj(attnpool.v_proj(x))[:, 1:]
    torch.testing.assert_close(tokens.patch_tokens, values, rtol=0, atol=2e-4)
    q, k, v = (
        project(x).unflatten(-1, (attnpool.num_heads, -1)).transpose(1, 2)
        for project in (attnpool.q_proj, attnpool.k_proj, attnpool.v_proj)
    )
    seen = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1) @ v
    own = attnpool.c_proj(seen.transpose(1, 2).flatten(2))[:, 0]
    torch.testing.assert_close(tokens.class_token, own, rtol=0, atol=2e-4)


def test_blocks_can_be_told_by_the_first_one(network):
    assert network("vit", blocks="from 7").plan.blocks == 6
    assert network("vit", blocks="from 1").plan.blocks == 12
    assert network("vit", attention="maskclip", blocks="from 7").plan.blocks == 1
    assert network("rn", blocks="from 7").plan.blocks == 1
    for bad in ("7", "from 13", "from 0", "the last"):
        with pytest.raises(InvalidSetting, match="blocks="):
            network("vit", blocks=bad)


def test_the_literal_reading_reforms_18_blocks_of_vit_l_14():
    import json
    import tempfile
    from pathlib import Path

    vision = {"image_size": 28, "layers": 24, "width": 64, "head_width": 64, "patch_size": 14}
    text = {"context_length": 8, "vocab_size": 64, "width": 64, "heads": 1, "layers": 1}
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "deep.json"
        config.write_text(json.dumps({"embed_dim": 32, "vision_cfg": vision, "text_cfg": text}))
        assert load_backbone(config, blocks="from 7").plan.blocks == 18
        assert load_backbone(config).plan.blocks == 6
