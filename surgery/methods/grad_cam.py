"""Grad-CAM (Selvaraju et al. 2017, arXiv 1610.02391) of CLIP's logits."""

import torch
from torch import Tensor

from surgery.backbone import Backbone
from surgery.methods._gradients import Recorder, class_cosines, gradients, on_grid
from surgery.texts import Texts
from surgery.towers import ResNet, Step, Tower


class _Features(Recorder):
    """Keeps what the last block's attention reads; of a ResNet, what enters its attention pool."""

    features: Tensor

    def __init__(self, tower: Tower) -> None:
        super().__init__(tower.depth - 1)
        self.pooled = isinstance(tower, ResNet)

    def enter(self, step: Step) -> None:
        super().enter(step)
        self.features = step.x

    def see(self, step: Step) -> Tensor:
        if not self.pooled:
            self.features = step.normed
        return super().see(step)


def explain(backbone: Backbone, images: Tensor, texts: Texts) -> Tensor:
    """Features of the last layer, weighted with the mean of their gradient over the grid.

    With A(i, c) channel c of cell i, and y a text's logit (Equations 1 and 2, without the ReLU):
        map(i) = sum_c A(i, c) mean_j(dy / dA(j, c))
    A is `layer4`'s output of a ResNet; of a ViT the last block's `ln_1`, class token left out.
    These are the numbers of jacobgil/pytorch-grad-cam, given the logit as its target. Its own example
    for CLIP takes the softmax over texts instead, by which a map depends on what else is asked for.

    Args:
        backbone: whose recipe plays no part.
        images: [B, 3, H, W], normalised.
        texts: T of them.

    Returns:
        [B, T, h, w], signed.
    """
    plain = backbone.with_attention("raw")
    visitor = _Features(plain.tower)
    x = plain.walk(images, visitor, class_only=True)
    logits = plain.logit_scale * class_cosines(plain, x, texts.features)
    start = 0 if visitor.pooled else plain.tower.prefix
    features = visitor.features[:, start:].detach()
    maps = []
    for (gradient,) in gradients(logits, [visitor.features]):
        weights = gradient[:, :, start:].mean(dim=2)
        maps.append(torch.einsum("tbc,bnc->tbn", weights, features))
    return on_grid(maps, plain, images)
