"""Grad-ECLIP (Zhao et al. 2024, arXiv 2502.18816): which values the class token's feature rests on."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from surgery.backbone import Backbone
from surgery.methods._gradients import Recorder, class_cosines, first_block, gradients, on_grid
from surgery.texts import Texts
from surgery.towers import Step, merge_heads, split_heads


class _Values(Recorder):
    """Keeps what each block's attention gives, its cells' values, and how near their keys are."""

    def __init__(self, first: int, heads: str, nearness: str) -> None:
        super().__init__(first)
        self.heads, self.nearness = heads, nearness
        self.seen: list[Tensor] = []
        self.values: list[Tensor] = []

    def see(self, step: Step) -> Tensor:
        query, key, value = (merge_heads(part) for part in (step.q, step.k, step.v))
        if self.heads == "one":
            step.q, step.k, step.v = query[:, None], key[:, None], value[:, None]
        seen = merge_heads(super().see(step))
        near = self._near(step, query[:, :1].detach(), key[:, 1:].detach())
        self.seen.append(seen)
        self.values.append(value[:, 1:].detach() * near[..., None])
        return split_heads(seen, step.q.shape[1])

    def _near(self, step: Step, query: Tensor, key: Tensor) -> Tensor:
        """Nearness of the class token's query [B, 1, D] to the cells' keys [B, N, D]: [B, N]."""
        if self.nearness == "none":
            return key.new_ones(key.shape[:2])
        if self.nearness == "projected":
            out = step.block.attn.out_proj
            query, key = (F.linear(x, out.weight, out.bias) for x in (query, key))
        cosine = F.cosine_similarity(query, key, dim=-1)
        low, high = cosine.amin(1, keepdim=True), cosine.amax(1, keepdim=True)
        return (cosine - low) / (high - low).clamp(min=torch.finfo(cosine.dtype).tiny)


def explain(
    backbone: Backbone,
    images: Tensor,
    texts: Texts,
    *,
    blocks: int = 1,
    heads: Literal["one", "own"] = "one",
    nearness: Literal["loose", "projected", "none"] = "loose",
) -> Tensor:
    """Values of the cells along the gradient of the score, weighted by how near their keys are.

    With G the gradient of the cosine of class token and text with respect to what the attention gives
    the class token (before its output projection), v, k a cell's value and key and q the class
    token's query, all over the whole width:
        map(i) = max(sum over channels of G v(i) s(i), 0),      s = min-max over cells of cos(q, k(i))
    and the maps of several blocks are summed. The numbers are those of Cyang-Zhao/Grad-Eclip's
    notebook. It passes 1 for the number of heads, so the explained blocks attend with one head over the
    whole width (and the image feature is not quite CLIP's); that is kept, `heads="own"` mends it.

    Args:
        backbone: whose recipe plays no part; a ViT.
        images: [B, 3, H, W], normalised.
        texts: T of them.
        blocks: how many of the last ones.
        heads: "one", as released, or the network's "own" in the explained blocks.
        nearness: s from q and k ("loose", the notebook's), from both through the output projection
            ("projected", the script generate_emap.py's), or 1 everywhere ("none").

    Returns:
        [B, T, h, w], 0 or more.
    """
    plain = backbone.with_attention("raw")
    visitor = _Values(first_block(plain, blocks), heads, nearness)
    x = plain.walk(images, visitor, class_only=True)
    cosines = class_cosines(plain, x, texts.features)
    maps = []
    for found in gradients(cosines, visitor.seen):
        total = [
            torch.einsum("tbd,bnd->tbn", gradient[:, :, 0], values).clamp(min=0)
            for gradient, values in zip(found, visitor.values, strict=True)
        ]
        maps.append(torch.stack(total).sum(dim=0))
    return on_grid(maps, plain, images)
