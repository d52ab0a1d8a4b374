"""The image towers' forward, ViT and ResNet, on the weights of stock open_clip modules.

The one place where a `Recipe` meets the network. Nothing here has state.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgery.attention import Recipe, attend, neighbour_bias


@dataclass(frozen=True)
class ImageTokens:
    """What an image tower says of B images: projected to the joint space, NOT normalised.

    class_token [B, C]; patch_tokens [B, h*w, C], row by row; grid (h, w).
    """

    class_token: Tensor
    patch_tokens: Tensor
    grid: tuple[int, int]


@dataclass(frozen=True)
class Plan:
    """A recipe settled for one tower: `blocks` reformed blocks, and whose class token is kept."""

    recipe: Recipe
    blocks: int
    new_class_token: bool


def encode_vit(visual: Any, images: Tensor, positions: Tensor, plan: Plan) -> ImageTokens:
    """Run a ViT (open_clip's `VisionTransformer`) by a plan.

    images [B, 3, H, W], normalised; H and W multiples of the patch size. positions [1 + h*w, D]:
    position embeddings of this grid.

    With x the original path and y the new one, each reformed block l does
        y <- y + out_proj(attention(ln_1(x)))           (recipe "surgery", Eq. 2-3 of the paper)
        x <- the block as it always was
    and at the end patches come from y and the class token from x, both through ln_post and
    projection. In the last block only x's class token is still of use, so only it is computed.
    """
    recipe = plan.recipe
    x, grid = _embed_patches(visual, images, positions)
    blocks = list(visual.transformer.resblocks)
    first = len(blocks) - plan.blocks
    for block in blocks[:first]:
        x = _plain_block(block, x)
    if not plan.blocks:
        patches, x = x[:, 1:], x[:, :1]
        return ImageTokens(_project(visual, x)[:, 0], _project(visual, patches), grid)

    # Nobody reads the new path's class token, unless the new path attends over itself.
    start = 0 if plan.new_class_token or recipe.reads == "itself" else 1
    bias = None
    if recipe.neighbour_std is not None:
        bias = neighbour_bias(grid, recipe.neighbour_std, x.device)
    # In the blocks' precision the few sums of the new path would lose digits; these cost nothing.
    y = widen(x[:, start:])
    for index, block in enumerate(blocks[first:], start=first):
        last = index == len(blocks) - 1
        normed = block.ln_1(x)
        q, k, v = _heads(block.attn, normed)
        read = normed
        new_q, new_k, new_v = q, k, v
        if recipe.reads == "itself":
            read = block.ln_1(y)
            new_q, new_k, new_v = _heads(block.attn, read)
        temperature = _temperature(read, q.shape[-1]) if recipe.iterations else None
        seen = attend(recipe, new_q, new_k, new_v, start=start, bias=bias, temperature=temperature)
        seen = block.ls_1(_merge_heads(block.attn, seen))
        y = y + seen if recipe.residual else seen
        if recipe.ffn:
            y = y + block.ls_2(block.mlp(block.ln_2(y)))
        if last:
            q, x = q[:, :, :1], x[:, :1]
        x = _finish_block(block, x, F.scaled_dot_product_attention(q, k, v))

    class_token = _project(visual, y[:, :1] if plan.new_class_token else x[:, :1])[:, 0]
    return ImageTokens(class_token, _project(visual, y[:, 1 - start :]), grid)


def encode_resnet(visual: Any, images: Tensor, positions: Tensor, plan: Plan) -> ImageTokens:
    """Run a `ModifiedResNet` by a plan: its attention pool, asked by every token.

    images [B, 3, H, W]; H and W multiples of 32. positions [1 + h*w, D]. Every token goes through
    c_proj. With `plan.new_class_token` the class token is the reformed attention's as well, as in
    the released code of CLIP Surgery (against the paper); else it is CLIP's own.
    """
    x = visual.stem(images.to(visual.conv1.weight.dtype))
    x = visual.layer4(visual.layer3(visual.layer2(visual.layer1(x))))
    grid = (x.shape[2], x.shape[3])
    x = widen(x.flatten(2).transpose(1, 2))
    x = torch.cat([x.mean(dim=1, keepdim=True), x], dim=1) + positions
    pool = visual.attnpool
    x = x.to(pool.q_proj.weight.dtype)
    q, k, v = (
        _split_heads(projection(x), pool.num_heads)
        for projection in (pool.q_proj, pool.k_proj, pool.v_proj)
    )
    recipe = plan.recipe
    if not plan.blocks:
        tokens = _pool_project(pool, F.scaled_dot_product_attention(q, k, v))
        return ImageTokens(tokens[:, 0], tokens[:, 1:], grid)
    bias = None
    if recipe.neighbour_std is not None:
        bias = neighbour_bias(grid, recipe.neighbour_std, x.device)
    temperature = _temperature(x, q.shape[-1]) if recipe.iterations else None
    tokens = _pool_project(pool, attend(recipe, q, k, v, bias=bias, temperature=temperature))
    if plan.new_class_token:
        return ImageTokens(tokens[:, 0], tokens[:, 1:], grid)
    own = _pool_project(pool, F.scaled_dot_product_attention(q[:, :, :1], k, v))
    return ImageTokens(own[:, 0], tokens[:, 1:], grid)


def resize_positions(
    positions: Tensor, native: tuple[int, int], grid: tuple[int, int], mode: str
) -> Tensor:
    """Position embeddings [1 + h0*w0, D] of the native grid, resized to `grid`, in float32.

    mode: "bilinear" (CLIP Surgery; no corner alignment, no antialias); "bicubic" (GEM, with
    antialias); "bicubic_scaled" (SCLIP and its descendants: bicubic, no antialias, where output
    cell i reads position (i + 0.5) g / (G + 0.1) - 0.5, since their code passes a scale factor).
    """
    positions = widen(positions.detach())
    if grid == native:
        return positions
    cells = positions[1:].reshape(1, *native, -1).permute(0, 3, 1, 2)
    if mode == "bilinear":
        cells = F.interpolate(cells, size=grid, mode="bilinear", align_corners=False)
    elif mode == "bicubic":
        cells = F.interpolate(cells, size=grid, mode="bicubic", antialias=True)
    elif mode == "bicubic_scaled":
        factors = [(new + 0.1) / old for new, old in zip(grid, native, strict=True)]
        cells = F.interpolate(cells, scale_factor=factors, mode="bicubic", align_corners=False)
    else:
        raise ValueError(f"unknown position embedding resize {mode!r}")
    return torch.cat([positions[:1], cells.flatten(2)[0].T])


def widen(x: Tensor) -> Tensor:
    """In float32, or float64 where it is."""
    return x if x.dtype == torch.float64 else x.float()


def wide_norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """A layer norm in float32 (or float64), whatever the precision of its weights and of x."""
    x = widen(x)
    weight, bias = norm.weight.to(x.dtype), norm.bias.to(x.dtype)
    return F.layer_norm(x, norm.normalized_shape, weight, bias, norm.eps)


def _embed_patches(
    visual: Any, images: Tensor, positions: Tensor
) -> tuple[Tensor, tuple[int, int]]:
    """Patches and class token through ln_pre [B, 1 + h*w, D]; the grid (h, w)."""
    x = visual.conv1(images.to(visual.conv1.weight.dtype))
    grid = (x.shape[2], x.shape[3])
    x = x.flatten(2).transpose(1, 2)
    class_token = visual.class_embedding.to(x.dtype).expand(x.shape[0], 1, -1)
    x = torch.cat([class_token, x], dim=1) + positions.to(x.dtype)
    return visual.ln_pre(x), grid


def _plain_block(block: Any, x: Tensor) -> Tensor:
    q, k, v = _heads(block.attn, block.ln_1(x))
    return _finish_block(block, x, F.scaled_dot_product_attention(q, k, v))


def _finish_block(block: Any, x: Tensor, seen: Tensor) -> Tensor:
    """Output projection, residual, and feed-forward part of an unchanged block."""
    x = x + block.ls_1(_merge_heads(block.attn, seen))
    return x + block.ls_2(block.mlp(block.ln_2(x)))


def _heads(attention: nn.MultiheadAttention, x: Tensor) -> list[Tensor]:
    """q, k and v of tokens [B, L, D], each [B, heads, L, d_head]."""
    qkv = F.linear(x, attention.in_proj_weight, attention.in_proj_bias)
    return [_split_heads(part, attention.num_heads) for part in qkv.chunk(3, dim=-1)]


def _split_heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _merge_heads(attention: nn.MultiheadAttention, seen: Tensor) -> Tensor:
    return attention.out_proj(seen.transpose(1, 2).flatten(2))


def _temperature(x: Tensor, d_head: int) -> Tensor:
    """GEM's: mean length of an image's tokens / sqrt(d_head), [B, 1, 1, 1]."""
    return x.float().norm(dim=-1).mean(dim=-1)[:, None, None, None] * d_head**-0.5


def _project(visual: Any, x: Tensor) -> Tensor:
    """ln_post and projection in float32, whatever the precision of the blocks."""
    with torch.autocast(x.device.type, enabled=False):
        x = wide_norm(visual.ln_post, x)
        return x @ visual.proj.to(x.dtype)


def _pool_project(pool: Any, seen: Tensor) -> Tensor:
    with torch.autocast(seen.device.type, enabled=False):
        merged = widen(seen).transpose(1, 2).flatten(2)
        projection = pool.c_proj
        return F.linear(
            merged, projection.weight.to(merged.dtype), projection.bias.to(merged.dtype)
        )
