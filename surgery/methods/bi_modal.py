"""Bi-Modal relevance (Chefer et al. 2021, arXiv 2103.15679) of CLIP's image tower."""

from torch import Tensor

from surgery.backbone import Backbone
from surgery.methods._gradients import Recorder, class_cosines, first_block, gradients, on_grid
from surgery.texts import Texts
from surgery.towers import Step


class _Attention(Recorder):
    """Keeps attention weights, block by block."""

    def __init__(self, first: int) -> None:
        super().__init__(first)
        self.weights: list[Tensor] = []

    def see(self, step: Step) -> Tensor:
        self.weights.append(step.weights())
        return self.weights[-1] @ step.v


def explain(backbone: Backbone, images: Tensor, texts: Texts, *, blocks: int | None = 1) -> Tensor:
    """How the class token comes by what it knows: attention times gradient, through the blocks.

    With A a block's attention and y a text's logit (Equations 5 and 6):
        C = mean over heads of max(A dy/dA, 0),     R <- R + C R from the first block to the last,
    and the map is the class token's row of R, which begins as the identity. Only that row is computed,
    from the last block to the first: r <- r + r C. The numbers are those of the image part of
    hila-chefer/Transformer-MM-Explainability, notebook CLIP_explainability.

    Args:
        backbone: whose recipe plays no part; a ViT.
        images: [B, 3, H, W], normalised.
        texts: T of them.
        blocks: how many of the last ones; 1 is the notebook's default, None takes all.

    Returns:
        [B, T, h, w], 0 or more.
    """
    plain = backbone.with_attention("raw")
    visitor = _Attention(first_block(plain, blocks))
    x = plain.walk(images, visitor, class_only=True)
    logits = plain.logit_scale * class_cosines(plain, x, texts.features)
    maps = []
    for found in gradients(logits, visitor.weights):
        pairs = zip(found, visitor.weights, strict=True)
        passed = [(own * weights.detach()).clamp(min=0).mean(dim=2) for own, weights in pairs]
        row = passed[-1]  # [t, B, 1, L], since of the last block only the class token is read
        row[..., 0] += 1
        for relevance in passed[-2::-1]:
            row = row + row @ relevance
        maps.append(row[:, :, 0, 1:])
    return on_grid(maps, plain, images)
