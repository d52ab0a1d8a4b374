"""LeGrad (Bousselham et al. 2024, arXiv 2404.03214): how a score moves with each layer's attention."""

import torch
from torch import Tensor

from surgery.backbone import Backbone
from surgery.features import similarity
from surgery.methods._gradients import Recorder, first_block, gradients, on_grid
from surgery.texts import Texts
from surgery.towers import Step


class _Layers(Recorder):
    """Adds up the layers' maps on the way, so that the graph of one block is all there ever is."""

    weights: Tensor

    def __init__(self, backbone: Backbone, text: Tensor, first: int) -> None:
        super().__init__(first)
        self.backbone, self.text = backbone, text
        self.maps: list[Tensor] = []

    def enter(self, step: Step) -> None:
        if step.index >= self.first:
            step.x = step.x.detach().requires_grad_()

    def see(self, step: Step) -> Tensor:
        self.weights = step.weights()
        return self.weights @ step.v

    def leave(self, step: Step) -> None:
        if step.index < self.first:
            return
        mean = self.backbone.tower.project(step.x.mean(dim=1, keepdim=True))
        scores = similarity(mean, self.text)[:, 0]
        found = [
            gradient.clamp(min=0).mean(dim=(2, 3))[..., 1:]
            for (gradient,) in gradients(scores, [self.weights])
        ]
        own = torch.cat(found)
        self.maps = [own if not self.maps else self.maps[0] + own]


def explain(backbone: Backbone, images: Tensor, texts: Texts, *, blocks: int = 2) -> Tensor:
    """The sum over blocks of how a score, read after a block, grows with that block's attention.

    With A a block's attention and s the cosine of a text with the mean of all tokens after that block
    (class token included), through the last norm and the projection:
        map(j) = sum over blocks of mean over heads and rows i of max(ds / dA(i, j), 0)
    The numbers are those of WalBouss/LeGrad before they are scaled, under the version of open_clip
    that it was written for; under 3.x unchanged LeGrad reads the wrong axis as tokens.

    Args:
        backbone: whose recipe plays no part; a ViT.
        images: [B, 3, H, W], normalised.
        texts: T of them.
        blocks: how many of the last ones; 2 is LeGrad's default.

    Returns:
        [B, T, h, w], 0 or more.
    """
    plain = backbone.with_attention("raw")
    visitor = _Layers(plain, texts.features, first_block(plain, blocks))
    plain.walk(images, visitor)
    return on_grid(visitor.maps, plain, images)
