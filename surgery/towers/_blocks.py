"""What a block of open_clip's Vision Transformer does, part by part.

Where no gradients are recorded, sums and activations are written in place: new tensors for them
would cost about a tenth of the whole forward on a CPU, most of it for fresh pages.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgery.precision import wide_norm
from surgery.towers._tower import merge_heads, split_heads


def workspace(mlp: Any, x: Tensor) -> Tensor | None:
    """Room for the inner features of tokens x [B, L, D] in every block's MLP, [B*L, 4D].

    The largest tensor of the forward: with a new one for every block, a CPU spends as long on
    mapping its pages as on the GELU. GPUs have an allocator that keeps memory.
    """
    if torch.is_grad_enabled() or x.device.type != "cpu":
        return None
    weight = mlp.c_fc.weight
    room: Tensor = weight.new_empty(x.shape[0] * x.shape[1], weight.shape[0])
    return room


def add(x: Tensor, more: Tensor) -> Tensor:
    """The sum, written into x unless gradients are recorded."""
    return x + more if torch.is_grad_enabled() else x.add_(more)


def norm_tokens(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """A block's norm, also of tokens that are kept in more bits than its weights have."""
    same = x.dtype == norm.weight.dtype
    return norm(x) if same else wide_norm(norm, x).to(norm.weight.dtype)


def add_attention(block: Any, x: Tensor, output: Tensor) -> Tensor:
    """x [B, L, D] plus the output projection of what its tokens saw, [B, heads, L, d_head]."""
    out = block.attn.out_proj
    return _add_linear(x, merge_heads(output), out.weight, out.bias, block.ls_1)


def add_mlp(block: Any, x: Tensor, hidden: Tensor | None = None) -> Tensor:
    """x [B, L, D] plus the feed-forward part of a block; `hidden` is a `workspace`."""
    mlp, normed = block.mlp, norm_tokens(block.ln_2, x)
    if hidden is None:
        inner = mlp.c_fc(normed)
    else:
        rows = normed.flatten(0, 1).to(hidden.dtype)
        inner = hidden[: len(rows)]
        torch.addmm(mlp.c_fc.bias, rows, mlp.c_fc.weight.T, out=inner)
        inner = inner.view(*x.shape[:2], inner.shape[-1])
    inner = _activate(mlp.gelu, inner)
    return _add_linear(x, inner, mlp.c_proj.weight, mlp.c_proj.bias, block.ls_2)


def _add_linear(
    x: Tensor, inputs: Tensor, weight: Tensor, bias: Tensor, scale: nn.Module
) -> Tensor:
    """x + scale(inputs @ weight.T + bias), written into x unless gradients are recorded."""
    if torch.is_grad_enabled():
        return x + scale(F.linear(inputs, weight, bias))
    if isinstance(scale, nn.Identity) and x.dtype == inputs.dtype == weight.dtype:
        rows = x.view(-1, x.shape[-1])
        with torch.autocast(x.device.type, enabled=False):
            rows.addmm_(inputs.reshape(-1, inputs.shape[-1]), weight.T).add_(bias)
        return x
    return x.add_(scale(F.linear(inputs, weight, bias)))


def _activate(activation: nn.Module, x: Tensor) -> Tensor:
    """GELU or OpenAI's quick one, written into x unless gradients are recorded."""
    if torch.is_grad_enabled():
        return activation(x)
    if type(activation) is nn.GELU and activation.approximate == "none":
        return torch.ops.aten.gelu_(x)
    if type(activation).__name__ == "QuickGELU":
        return F.silu(x.mul_(1.702), inplace=True).div_(1.702)
    return activation(x)


def heads(attention: nn.MultiheadAttention, x: Tensor, which: str = "qkv") -> list[Tensor]:
    """Those of q, k and v of tokens [B, L, D] (neighbours in "qkv"), each [B, heads, L, d_head]."""
    first, count = "qkv".index(which), len(which)
    width = x.shape[-1]
    rows = slice(first * width, (first + count) * width)
    out = F.linear(x, attention.in_proj_weight[rows], attention.in_proj_bias[rows])
    return [split_heads(part, attention.num_heads) for part in out.chunk(count, dim=-1)]
