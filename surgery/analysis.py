"""Looking into CLIP: what its attention selects, what its modules say, what all texts share.

The three analyses of the paper: Eq. 4 with Fig. 4, Eq. 5 with Fig. 5, and Fig. 6. Nothing here changes
the network: one pass through the blocks of a stock ViT gives all that they need of it.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from common.errors import InvalidSetting
from surgery.backbone import Backbone
from surgery.features import similarity_map
from surgery.precision import widen
from surgery.towers import ImageTokens, Step, Visitor, ViT

ATTENTIONS = ("raw", "consistent")
"""Self-attention as CLIP has it, softmax(q k^T) (Eq. 2), and the paper's, softmax(v v^T) (Eq. 3)."""

MODULES = ("attention", "ffn")
"""What a block adds to its tokens, in this order."""


@dataclass(frozen=True)
class Inside:
    """What a ViT does with B images, on the path that plain CLIP takes.

    Attributes:
        attention: self-attention of the last block among the 1 + N tokens, [B, 1 + N, 1 + N], mean
            over heads, rows sum to 1, for each of `ATTENTIONS`. Token 0 is the class token.
        modules: class token of what each module adds, times the last projection,
            [B, blocks, 2, C] in the order of `MODULES`.
        normed_modules: the same with `ln_post` before the projection, as CLIP's own features have it.
        tokens: plain CLIP's.
    """

    attention: dict[str, Tensor]
    modules: Tensor
    normed_modules: Tensor
    tokens: ImageTokens


def check_blocks(backbone: Backbone) -> None:
    """Refuse a backbone without the modules that `look_inside` shows: ResNets, and some others.

    Raises:
        InvalidSetting: it is one.
    """
    if not isinstance(backbone.tower, ViT):
        raise InvalidSetting(
            f"{backbone.name}: a ResNet has no attention and FFN modules to look into"
        )
    if not backbone.tower.has_modules:
        raise InvalidSetting(
            f"{backbone.name}: the analyses show what modules add to the class token; this image tower "
            f"{backbone.tower.pooled_by}"
        )


def look_inside(backbone: Backbone, images: Tensor) -> Inside:
    """Walk through the blocks of a ViT. The recipe of the backbone plays no part.

    Args:
        backbone: whose tower has such blocks.
        images: [B, 3, H, W] as `encode_image` takes them.

    Returns:
        What there was to see.

    Raises:
        InvalidSetting: see `check_blocks`.
    """
    check_blocks(backbone)
    tower = backbone.tower

    def look(part: Tensor) -> tuple[Tensor, ...]:
        notes = _Notes(tower.depth - 1)
        tokens = tower.project(backbone.walk(part, notes))
        modules = torch.stack(notes.modules, dim=1)  # [B, 2 * blocks, D]
        return tokens, modules, *(notes.attention[kind] for kind in ATTENTIONS)

    tokens, modules, *attention = backbone.graph_batches.run(look, images)
    grid = tower.grid((images.shape[2], images.shape[3]))
    pairs = (tower.depth, len(MODULES))
    return Inside(
        dict(zip(ATTENTIONS, attention, strict=True)),
        tower.project(modules, norm=False).unflatten(1, pairs),
        tower.project(modules).unflatten(1, pairs),
        ImageTokens(tokens[:, 0], tokens[:, 1:], grid),
    )


class _Notes(Visitor):
    """Keeps the class token of every module's output, and the last block's attention."""

    apart = True

    def __init__(self, last: int) -> None:
        self.last = last
        self.modules: list[Tensor] = []
        self.attention: dict[str, Tensor] = {}

    def leave(self, step: Step) -> None:
        assert step.attended is not None  # both are there, since they are wanted apart
        assert step.fed is not None
        self.modules += [step.attended[:, 0], step.fed[:, 0]]
        if step.index == self.last:
            self.attention = {
                "raw": _mean_attention(step.q, step.k),
                "consistent": _mean_attention(step.v, step.v),
            }


def cells(masks: Tensor, grid: tuple[int, int]) -> Tensor:
    """Masks as shares of the cells of a grid that they cover, also where it does not divide them.

    Args:
        masks: bool [P, H, W].
        grid: (h, w).

    Returns:
        [P, h*w] in [0, 1].
    """
    rows, columns = (
        _overlap(count, size, masks.device)
        for count, size in zip(grid, masks.shape[1:], strict=True)
    )
    return (rows @ masks.float() @ columns.T).flatten(1)


def strongest(similarity: Tensor) -> Tensor:
    """The patch at the highest score of each map [N, P]: [P] indices, row by row."""
    return similarity.argmax(dim=0)


def foreground_selection(attention: Tensor, queries: Tensor, foreground: Tensor) -> Tensor:
    """How much of the attention that one token pays lies on the object (FSR, Eq. 4).

    mFSR is its mean over the samples of a class (every positive label of all images), then over
    classes. Attention that sees nothing would score the share of the object in the image.

    Args:
        attention: [1 + N, 1 + N] of the last block, mean over heads, the class token first.
        queries: [P], for each object the patch at the highest score of its label's similarity map.
        foreground: [P, N], the share of each cell that the object covers. With it the sum over cells
            equals that over pixels of the enlarged attention, wherever the grid divides the image.

    Returns:
        [P] in [0, 1]; an object that is nowhere has 0.
    """
    row = widen(attention)[1 + queries, 1:]
    return (row * foreground).sum(dim=1) / row.sum(dim=1)


def affinity(features: Tensor, text: Tensor) -> Tensor:
    """Mean cosine of features with texts (Eq. 5).

    Args:
        features: [..., C], projected.
        text: [T, C], such as an image's positive labels.

    Returns:
        [...] in [-1, 1]; NaN where there are no texts.
    """
    with torch.autocast(features.device.type, enabled=False):
        cosines = F.normalize(widen(features), dim=-1) @ F.normalize(widen(text), dim=-1).T
    return cosines.mean(dim=-1)


def map_distance(maps: Tensor, empty: Tensor) -> Tensor:
    """How far maps are from that of the empty text, and from nothing (Fig. 6).

    Args:
        maps: [P, H, W] in [0, 1], of texts.
        empty: [H, W] in [0, 1], of the empty text.

    Returns:
        [P, 2] in [0, 1], means over pixels of |map - empty| and of |map - 0|.
    """
    return torch.stack([(maps - empty).abs().mean((1, 2)), maps.abs().mean((1, 2))], dim=1)


def map_likeness(similarity: Tensor, reference: Tensor) -> Tensor:
    """How like the maps of texts are to that of the empty text, beside `map_distance`.

    Args:
        similarity: [N, P] on the token grid; scaled to [0, 1] as maps are shown.
        reference: [N] of the empty text.

    Returns:
        [P, 2]: their cosine, in [0, 1], and their correlation, in [-1, 1], which is 0 for maps that
        have nothing to do with each other. Constant maps give 0.
    """
    grid = (len(reference), 1)
    both = torch.cat([similarity, reference[:, None]], dim=1)[None]
    maps = similarity_map(both, grid, grid)[0].flatten(1)
    centred = maps - maps.mean(dim=1, keepdim=True)
    return torch.stack([F.cosine_similarity(m[:-1], m[-1:], dim=1) for m in (maps, centred)], dim=1)


def _mean_attention(queries: Tensor, keys: Tensor) -> Tensor:
    """softmax(a . b / sqrt(d_head)) of [B, heads, L, d_head], mean over heads, in float32."""
    with torch.autocast(queries.device.type, enabled=False):
        logits = widen(queries) @ widen(keys).transpose(-2, -1)
        return (logits * queries.shape[-1] ** -0.5).softmax(dim=-1).mean(dim=1)


def _overlap(count: int, size: int, device: torch.device) -> Tensor:
    """[count, size]: share of each of `count` equal parts of a line that each of its pixels has."""
    width = size / count
    low = torch.arange(count, dtype=torch.float64)[:, None] * width
    pixel = torch.arange(size, dtype=torch.float64)
    covered = torch.minimum(low + width, pixel + 1) - torch.maximum(low, pixel)
    return (covered.clamp_min(0) / width).float().to(device)
