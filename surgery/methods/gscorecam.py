"""gScoreCAM (Chen et al., ACCV 2022): what CLIP scores of the image where a channel is active."""

import torch
import torch.nn.functional as F
from torch import Tensor

from common.errors import InvalidSetting
from surgery.backbone import Backbone
from surgery.methods._gradients import Recorder, class_cosines, gradients
from surgery.precision import widen
from surgery.texts import Texts
from surgery.towers import ResNet, Step, Visitor

_CELLS_AT_ONCE = 4096
"""Of masked images: 20 of ViT-B/16 at 224."""


class _Cells(Recorder):
    """Keeps what enters a ResNet's attention pool."""

    cells: Tensor

    def enter(self, step: Step) -> None:
        super().enter(step)
        self.cells = step.x


def explain(backbone: Backbone, images: Tensor, texts: Texts, *, channels: int = 300) -> Tensor:
    """Channels of the last features, weighted by the score of the image seen through each of them.

    Of the channels A(c) of `layer4` (ResNet) or of the last block's patch tokens (ViT), those with the
    largest gradient of a text's logit are chosen: its mean over the grid (ResNet), or that at the class
    token (ViT). Each is enlarged to the image (bilinear, corners aligned), scaled to [0, 1], and the
    normalised image multiplied with it has the logit y(c). Then
        map(i) = sum over all channels of w(c) A(i, c),      w = softmax of y over all channels,
    and y is 0 for those not chosen, as in anguyen8/gScoreCAM (`is_clip=True`, of a ViT with
    `is_transformer=True`), one text at a time, whose numbers these are. That 0 is no floor: where
    logits are small, channels that were not chosen weigh too.

    One masked image serves all texts that have chosen its channel: an image costs min(T channels,
    all channels) forward passes.

    Args:
        backbone: whose recipe plays no part.
        images: [B, 3, H, W], normalised.
        texts: T of them.
        channels: how many are chosen; at most all there are. 300 is its authors' choice.

    Returns:
        [B, T, h, w], signed.

    Raises:
        InvalidSetting: less than one channel.
    """
    if channels < 1:
        raise InvalidSetting(f"channels={channels}: expected a number of channels, 1 or more")
    plain = backbone.with_attention("raw")
    text = texts.features
    features, importance = _channels(plain, images, text)
    grid = plain.tower.grid((images.shape[2], images.shape[3]))
    chosen = importance.topk(min(channels, features.shape[2]), dim=2).indices
    maps = []
    for image, own, channel in zip(images, features.detach(), chosen, strict=True):
        union, where = channel.unique(return_inverse=True)
        cells = own.T.unflatten(1, grid)
        scores = _masked_logits(plain, image, cells[union], text)
        logits = scores.new_zeros(len(text), len(cells))
        logits.scatter_(1, channel, scores.T.gather(1, where))
        maps.append(torch.einsum("tc,chw->thw", logits.softmax(dim=1), widen(cells)))
    return torch.stack(maps)


def _channels(plain: Backbone, images: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """Features [B, N, D] of the cells, and how a text's logit depends on each channel [B, T, D]."""
    if isinstance(plain.tower, ResNet):
        visitor = _Cells(0)
        x = plain.walk(images, visitor, class_only=True)
        features = leaf = visitor.cells
    else:
        with torch.no_grad():
            x = plain.walk(images, Visitor())
        features, leaf = x[:, 1:], x[:, :1].requires_grad_()
        x = leaf
    logits = plain.logit_scale * class_cosines(plain, x, text)
    found = [gradient.mean(dim=2) for (gradient,) in gradients(logits, [leaf])]
    return features, torch.cat(found).transpose(0, 1)


@torch.no_grad()
def _masked_logits(plain: Backbone, image: Tensor, masks: Tensor, text: Tensor) -> Tensor:
    """Logits [K, T] of an image [3, H, W] seen through each of K masks [K, h, w]."""

    def encode(masks: Tensor) -> tuple[Tensor]:
        size = image.shape[-2:]
        masks = F.interpolate(masks[:, None], size=size, mode="bilinear", align_corners=True)
        low, high = masks.amin((2, 3), keepdim=True), masks.amax((2, 3), keepdim=True)
        x = plain.walk((masks - low) / (high - low + 1e-6) * image, Visitor(), class_only=True)
        return (plain.logit_scale * class_cosines(plain, x, text),)

    at_once = max(1, _CELLS_AT_ONCE // masks[0].numel())
    return torch.cat([plain.graph_batches.run(encode, part)[0] for part in masks.split(at_once)])
