"""Partial layer-wise relevance propagation (pLRP): from a score back to the last block's attention."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgery.backbone import Backbone
from surgery.methods._gradients import on_grid
from surgery.precision import wide_norm, widen
from surgery.texts import Texts
from surgery.towers import Step, Visitor, merge_heads, split_heads

_TEXTS_AT_ONCE = 32


class _LastBlock(Visitor):
    """Keeps the last block, of which only the class token is read."""

    apart = True
    reads_queries = False
    step: Step
    weights: Tensor

    def __init__(self, last: int) -> None:
        self.last = last

    def attend(self, step: Step) -> Tensor:
        if step.index < self.last:
            return super().attend(step)
        self.step, self.weights = step, step.weights()
        return self.weights @ step.v


def explain(backbone: Backbone, images: Tensor, texts: Texts) -> Tensor:
    """Relevance of the class token's attention weights in the last block, mean over heads.

    A text's score is relevance 1, which is handed back, part by part, to what the score was made of. By
    the rules of hila-chefer/Transformer-Explainability, class ViT_orig_LRP, `generate_LRP` with
    method="last_layer", whose numbers these are (the score being its head):
        a linear layer hands R(j) to its inputs as x+ w+ / sum of x+ w+, and once more as x- w- / sum of
            x- w-: the total doubles where both signs occur, which is kept. Its bias gets nothing;
        a sum hands it to its two terms in proportion to them (signed);
        attention weights times values hand half of it to either, in proportion to the products;
        norms, activations, layer scales and softmax hand it on as it is.
    Of the last block only the class token is read, so all of this is arithmetic on one token, for many
    texts at once and without a backward pass. Shares are taken of sums that may be near 0, so the network
    is run without autocast.

    Args:
        backbone: whose recipe plays no part; a ViT.
        images: [B, 3, H, W], normalised.
        texts: T of them.

    Returns:
        [B, T, h, w], 0 or more.
    """
    plain = backbone.with_attention("raw")
    with torch.autocast(images.device.type, enabled=False):
        visitor = _LastBlock(plain.tower.depth - 1)
        x = plain.walk(images, visitor, class_only=True)
        visual = plain.tower.visual
        final = wide_norm(visual.ln_post, x)
        text = F.normalize(texts.features.to(final.dtype), dim=-1)
        maps = []
        for part in text.split(_TEXTS_AT_ONCE):
            # Each score is a layer of its own: one output, and the inputs [B, 1, D].
            head = part @ visual.proj.to(final.dtype).T
            parts = torch.stack([a * b for a, b in _signs(final, head)])
            relevance = _share(parts, parts.sum(dim=-1, keepdim=True)).sum(dim=0)
            maps.append(_through_block(relevance, visitor.step, visitor.weights))
    return on_grid(maps, plain, images)


def _through_block(relevance: Tensor, step: Step, weights: Tensor) -> Tensor:
    """From relevance of what leaves a block to that of its attention weights.

    Args:
        relevance: [B, t, D], of the class token.
        step: the block, left by the class token [B, 1, D].
        weights: [B, heads, 1, L], of the class token.

    Returns:
        [t, B, N] of the cells, negatives cut off, mean over heads.
    """
    assert step.attended is not None  # wanted apart
    assert step.fed is not None
    block, after, fed = step.block, widen(step.x), widen(step.fed)
    middle, attended, value = after - fed, widen(step.attended), widen(step.v)
    normed = wide_norm(block.ln_2, middle)
    inner = block.mlp.gelu(F.linear(normed, *_wide(block.mlp.c_fc)))
    seen = widen(weights) @ value

    total = _share(relevance, after)
    of_inner = _to_inputs(total * fed, inner, block.mlp.c_proj)
    of_middle = total * middle + _to_inputs(of_inner, normed, block.mlp.c_fc)
    of_seen = _share(of_middle, middle) * attended
    of_seen = _to_inputs(of_seen, merge_heads(seen), block.attn.out_proj)
    of_seen = _share(split_heads(of_seen, value.shape[1]), seen)  # [B, heads, t, d_head]
    of_weights = of_seen @ value.transpose(-2, -1) * widen(weights) / 2
    return of_weights[..., 1:].clamp(min=0).mean(dim=1).transpose(0, 1)


def _to_inputs(relevance: Tensor, x: Tensor, layer: nn.Linear) -> Tensor:
    """From relevance [B, t, O] of a linear layer's outputs to its inputs x [B, 1, I]: [B, t, I]."""
    weight, _ = _wide(layer)
    one, other = (a * (_share(relevance, F.linear(a, b)) @ b) for a, b in _signs(x, weight))
    return one + other


def _signs(x: Tensor, weight: Tensor) -> list[tuple[Tensor, Tensor]]:
    """What is positive of both, and what is negative of both."""
    return [(x.clamp(min=0), weight.clamp(min=0)), (x.clamp(max=0), weight.clamp(max=0))]


def _share(relevance: Tensor, total: Tensor) -> Tensor:
    """Relevance an amount of a total; none of a total of 0. The guard is the authors'."""
    return torch.where(total == 0, 0, relevance / (total + 1e-9))


def _wide(layer: nn.Linear) -> tuple[Tensor, Tensor]:
    return widen(layer.weight), widen(layer.bias)
