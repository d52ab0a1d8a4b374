"""The image towers' forward, ViT and ResNet, on the weights of stock open_clip modules.

The one place where a `Recipe` meets the network. Nothing here has state.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import InvalidSetting
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
    hidden = _workspace(blocks[0].mlp, x)
    for block in blocks[:first]:
        q, k, v = _heads(block.attn, block.ln_1(x))
        x = _add_attention(block, x, F.scaled_dot_product_attention(q, k, v))
        x = _add_mlp(block, x, hidden)
    if not plan.blocks:
        patches, x = x[:, 1:], x[:, :1]
        return ImageTokens(_project(visual, x)[:, 0], _project(visual, patches), grid)

    # Nobody reads the new path's class token, unless the new path attends over itself.
    start = 0 if plan.new_class_token or recipe.reads == "itself" else 1
    bias = None
    if recipe.neighbour_std is not None:
        bias = neighbour_bias(grid, recipe.neighbour_std, x.device)
    # In the blocks' precision the few sums of the new path would lose digits; these cost nothing.
    y = widen(x[:, start:]).clone(memory_format=torch.contiguous_format)
    for index, block in enumerate(blocks[first:], start=first):
        last = index == len(blocks) - 1
        normed = block.ln_1(x)
        if last and not recipe.asks_with_queries:
            (q,), (k, v) = _heads(block.attn, normed[:, :1], "q"), _heads(block.attn, normed, "kv")
        else:
            q, k, v = _heads(block.attn, normed)
        read = normed
        new_q, new_k, new_v = q, k, v
        if recipe.reads == "itself":
            read = block.ln_1(y)
            new_q, new_k, new_v = _heads(block.attn, read)
        temperature = _temperature(read, q.shape[-1]) if recipe.iterations else None
        seen = attend(recipe, new_q, new_k, new_v, start=start, bias=bias, temperature=temperature)
        if not recipe.residual:
            y = torch.zeros_like(y)
        y = _add_attention(block, y, seen)
        if recipe.ffn:
            y = _add_mlp(block, y, hidden)
        if last:
            q, x = q[:, :, :1], x[:, :1].contiguous()
        x = _add_attention(block, x, F.scaled_dot_product_attention(q, k, v))
        x = _add_mlp(block, x, hidden)

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
        raise InvalidSetting(f"unknown position embedding resize {mode!r}")
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
    x = visual.ln_pre(x)
    # Under autocast too, what all blocks add up is kept in float32: it halves their rounding.
    return (widen(x) if torch.is_autocast_enabled(x.device.type) else x), grid


def _add_attention(block: Any, x: Tensor, seen: Tensor) -> Tensor:
    """x [B, L, D] plus the output projection of what its tokens saw, [B, heads, L, d_head]."""
    out = block.attn.out_proj
    return _add_linear(x, _merge_heads(seen), out.weight, out.bias, block.ls_1)


def _workspace(mlp: Any, x: Tensor) -> Tensor | None:
    """Room for the inner features of tokens x [B, L, D] in every block's MLP, [B*L, 4D].

    The largest tensor of the forward: with a new one for every block, a CPU spends as long on
    mapping its pages as on the GELU. GPUs have an allocator that keeps memory.
    """
    if torch.is_grad_enabled() or x.device.type != "cpu":
        return None
    weight = mlp.c_fc.weight
    return weight.new_empty(x.shape[0] * x.shape[1], weight.shape[0])


def _add_mlp(block: Any, x: Tensor, hidden: Tensor | None = None) -> Tensor:
    """x [B, L, D] plus the feed-forward part of a block; `hidden` is a `_workspace`."""
    mlp, normed = block.mlp, block.ln_2(x)
    if hidden is None:
        inner = mlp.c_fc(normed)
    else:
        rows = normed.flatten(0, 1).to(hidden.dtype)
        inner = hidden[: len(rows)]
        torch.addmm(mlp.c_fc.bias, rows, mlp.c_fc.weight.T, out=inner)
        inner = inner.view(*x.shape[:2], inner.shape[-1])
    inner = _activate(mlp.gelu, inner)
    return _add_linear(x, inner, mlp.c_proj.weight, mlp.c_proj.bias, block.ls_2)


def _add_linear(x: Tensor, seen: Tensor, weight: Tensor, bias: Tensor, scale: nn.Module) -> Tensor:
    """x + scale(seen @ weight.T + bias), written into x unless gradients are recorded.

    A new tensor for every sum would cost about a tenth of the whole forward on a CPU, most of it
    for fresh pages.
    """
    if torch.is_grad_enabled():
        return x + scale(F.linear(seen, weight, bias))
    if isinstance(scale, nn.Identity) and x.dtype == seen.dtype == weight.dtype:
        rows = x.view(-1, x.shape[-1])
        with torch.autocast(x.device.type, enabled=False):
            rows.addmm_(seen.reshape(-1, seen.shape[-1]), weight.T).add_(bias)
        return x
    return x.add_(scale(F.linear(seen, weight, bias)))


def _activate(activation: nn.Module, x: Tensor) -> Tensor:
    """GELU or OpenAI's quick one, written into x unless gradients are recorded."""
    if torch.is_grad_enabled():
        return activation(x)
    if type(activation) is nn.GELU and activation.approximate == "none":
        return torch.ops.aten.gelu_(x)
    if type(activation).__name__ == "QuickGELU":
        return F.silu(x.mul_(1.702), inplace=True).div_(1.702)
    return activation(x)


def _heads(attention: nn.MultiheadAttention, x: Tensor, which: str = "qkv") -> list[Tensor]:
    """Those of q, k and v of tokens [B, L, D] (neighbours in "qkv"), each [B, heads, L, d_head]."""
    first, count = "qkv".index(which), len(which)
    width = x.shape[-1]
    rows = slice(first * width, (first + count) * width)
    out = F.linear(x, attention.in_proj_weight[rows], attention.in_proj_bias[rows])
    return [_split_heads(part, attention.num_heads) for part in out.chunk(count, dim=-1)]


def _split_heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _merge_heads(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


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
        merged = _merge_heads(widen(seen))
        projection = pool.c_proj
        return F.linear(
            merged, projection.weight.to(merged.dtype), projection.bias.to(merged.dtype)
        )
