"""timm's `VisionTransformer` behind open_clip: SigLIP, SigLIP 2, MobileCLIP-B and -L, ViTamin."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import InvalidSetting
from surgery.precision import wide_linear, wide_norm, widen
from surgery.towers._blocks import norm_tokens
from surgery.towers._tower import merge_heads, split_heads
from surgery.towers.vit import ViT

_POOLINGS = {"token": "class", "avg": "mean", "map": "attention"}


class TimmViT(ViT):
    """Blocks of timm, its norms and head, and open_clip's head after it.

    Where an attention pooling makes the image's feature (SigLIP), a patch token in the joint space is
    what that pooling makes of this token alone: its value, output projection, MLP and head, since the
    attention over one token is 1. It is what MaskCLIP does to the attention pool of CLIP's ResNets.
    """

    kind = "timm ViT"
    _block_names: tuple[str, ...] = ("Block",)
    _pools_prefix = False
    """Whether the attention pooling also reads the tokens before the patches' own."""

    def __init__(self, visual: Any) -> None:
        self.visual = visual
        self.trunk = trunk = visual.trunk
        embed = trunk.patch_embed
        stride = getattr(embed, "feature_ratio", (1, 1))  # of convolutions before the patches
        self.patch_size = (stride[0] * embed.patch_size[0], stride[1] * embed.patch_size[1])
        # Pixels beyond the last whole patch (SO400M/14 at 384) are never read.
        self.native = (
            embed.grid_size[0] * self.patch_size[0],
            embed.grid_size[1] * self.patch_size[1],
        )
        self.blocks = trunk.blocks
        self.depth = len(self.blocks)
        self.prefix = trunk.num_prefix_tokens
        self._check()
        self.pooling = _POOLINGS[trunk.global_pool]  # type: ignore[assignment]  # of a literal

    def _check(self) -> None:
        """Refuse what timm's class can also be, and no model of open_clip's list is."""
        trunk, block = self.trunk, self.blocks[0]
        attention = block.attn if hasattr(block, "attn") else None
        wrong = [
            what
            for what, found in {
                f"pooling by {trunk.global_pool!r}": trunk.global_pool not in _POOLINGS,
                f"blocks {type(block).__name__}": type(block).__name__ not in self._block_names,
                "gated attention": getattr(attention, "gate", None) is not None,
                "grouped queries": getattr(attention, "num_kv_groups", 1) != 1,
                "a prefix in the mean": getattr(trunk, "pool_include_prefix", False),
                "rotary positions of their own in every block": getattr(trunk, "rope_mixed", False),
            }.items()
            if found
        ]
        if wrong:
            raise InvalidSetting(f"timm image tower with {', '.join(wrong)}: not supported")

    @property
    def positions(self) -> Tensor:
        """The trunk's; zeros where it has none, as ViTamin's."""
        if self.trunk.pos_embed is None:
            rows, columns = self.grid(self.native)
            like: Tensor = next(self.blocks[0].parameters())
            with torch.inference_mode(False):  # as a weight would be
                return like.new_zeros(rows * columns, self.trunk.embed_dim)
        positions: Tensor = self.trunk.pos_embed[0]
        return positions

    def embed(self, images: Tensor, positions: Tensor) -> Tensor:
        """Class token and registers, if there are, and patches."""
        trunk, embed = self.trunk, self.trunk.patch_embed
        x = images.to(next(embed.parameters()).dtype)
        if hasattr(embed, "backbone"):
            x = embed.backbone(x)
        x = embed.proj(x).flatten(2).transpose(1, 2)
        x = embed.norm(x) if hasattr(embed, "norm") else x
        before = [token for token in (trunk.cls_token, trunk.reg_token) if token is not None]
        prefix = [token.to(x.dtype).expand(len(x), -1, -1) for token in before]
        positions = positions.to(x.dtype)
        if positions.shape[0] == x.shape[1]:
            x = torch.cat([*prefix, x + positions], dim=1)
        else:
            x = torch.cat([*prefix, x], dim=1) + positions
        x = trunk.norm_pre(x)
        return widen(x) if torch.is_autocast_enabled(x.device.type) else x

    def read(self, block: Any, x: Tensor) -> Tensor:
        """`norm1`."""
        return norm_tokens(block.norm1, x)

    def heads(
        self, block: Any, normed: Tensor, which: str = "qkv", rotary: Tensor | None = None
    ) -> list[Tensor]:
        """Of one matrix or of three, with the norms of queries and keys; see `ViT.heads`."""
        attn = block.attn
        if attn.qkv is None:
            parts = [getattr(attn, f"{name}_proj")(normed) for name in which]
        else:
            width = attn.num_heads * attn.head_dim
            first = "qkv".index(which)
            rows = slice(first * width, (first + len(which)) * width)
            bias = _bias(attn)
            found = F.linear(normed, attn.qkv.weight[rows], None if bias is None else bias[rows])
            parts = list(found.chunk(len(which), dim=-1))
        norms = {"q": attn.q_norm, "k": attn.k_norm, "v": nn.Identity()}
        return [
            norms[name](split_heads(part, attn.num_heads))
            for name, part in zip(which, parts, strict=True)
        ]

    def attended(self, block: Any, output: Tensor) -> Tensor:
        """Output projection and layer scale."""
        return block.ls1(self._seen(block.attn, output))

    def fed(self, block: Any, x: Tensor) -> Tensor:
        """Norm, MLP and layer scale."""
        return block.ls2(block.mlp(norm_tokens(block.norm2, x)))

    def project(self, x: Tensor, *, norm: bool = True) -> Tensor:
        """Norms, pooling of each token by itself, and heads; see `Tower.project`."""
        with torch.autocast(x.device.type, enabled=False):
            x = _norm(self.trunk.norm, x) if norm else widen(x)
            pool = self.trunk.attn_pool
            if pool is not None:
                value = pool.kv.weight.shape[0] // 2
                bias = None if pool.kv.bias is None else pool.kv.bias[value:].to(x.dtype)
                x = _finish(pool, F.linear(x, pool.kv.weight[value:].to(x.dtype), bias))
            return self._head(x, norm)

    def pool(self, x: Tensor) -> Tensor:
        """The class token's, that of the mean over patches, or of the attention pooling."""
        if self.pooling == "class":
            return super().pool(x)
        with torch.autocast(x.device.type, enabled=False):
            x = _norm(self.trunk.norm, x)
            if self.pooling == "mean":
                x = x[:, self.prefix :].mean(dim=1, keepdim=True)
            else:
                first = 0 if self._pools_prefix else self.prefix
                x = _attention_pool(self.trunk.attn_pool, x[:, first:])
            return self._head(x, True)[:, 0]

    def _head(self, x: Tensor, norm: bool) -> Tensor:
        """timm's norm after the pooling and its head, and open_clip's."""
        x = _norm(self.trunk.fc_norm, x) if norm else x
        for module in (self.trunk.head, *self.visual.head):
            if isinstance(module, nn.Linear):
                x = wide_linear(module, x)
            elif not isinstance(module, (nn.Identity, nn.Dropout)):
                raise InvalidSetting(f"timm image tower with the head {module}: not supported")
        return x

    def _seen(self, attn: Any, output: Tensor) -> Tensor:
        """Output projection of what was seen, with the norm before it that some have."""
        return attn.proj(attn.norm(merge_heads(output)))


def _bias(attn: Any) -> Tensor | None:
    """Of the joint matrix of queries, keys and values: one, or EVA's two with none for the keys."""
    if getattr(attn, "q_bias", None) is not None:
        return torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
    bias: Tensor | None = attn.qkv.bias
    return bias


def _norm(norm: nn.Module, x: Tensor) -> Tensor:
    return wide_norm(norm, x) if isinstance(norm, nn.LayerNorm) else widen(x)


def _attention_pool(pool: Any, x: Tensor) -> Tensor:
    """timm's `AttentionPoolLatent` with its one learned query, in the precision of x: [B, 1, D]."""
    latent = pool.latent.to(x.dtype)
    query = wide_linear(pool.q, latent) if isinstance(pool.q, nn.Linear) else latent
    key, value = wide_linear(pool.kv, x).chunk(2, dim=-1)
    q, k, v = (split_heads(part, pool.num_heads) for part in (query, key, value))
    q, k = pool.q_norm(q), pool.k_norm(k)
    seen = F.scaled_dot_product_attention(q.expand(len(x), -1, -1, -1), k, v)
    return _finish(pool, merge_heads(seen))


def _finish(pool: Any, x: Tensor) -> Tensor:
    """Output projection and MLP of an attention pooling, in the precision of x."""
    x = wide_linear(pool.proj, x)
    inner = pool.mlp.act(wide_linear(pool.mlp.fc1, _norm(pool.norm, x)))
    return x + wide_linear(pool.mlp.fc2, inner)
