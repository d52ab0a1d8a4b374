"""Looking into CLIP: what its attention selects, and what its modules say (Section 3 of the paper).

Nothing here changes the network: the blocks of a stock ViT are walked one after the other, and
each shows its attention and the projected outputs of its two modules.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from common.errors import InvalidSetting
from surgery.backbone import Backbone
from surgery.features import similarity_map
from surgery.precision import widen
from surgery.towers import Step, Tower, Visitor

ATTENTIONS = ("raw", "consistent")
"""Self-attention as CLIP has it, softmax(q k^T), and that of the paper, softmax(v v^T)."""

RATIOS = ("weight", "others", "top")
"""How `foreground_selection` measures, see there."""

MODULES = ("attention", "ffn")
TOKENS = ("class", "patches")


@dataclass(frozen=True)
class BlockView:
    """One block of a ViT on B images, on the path that plain CLIP takes.

    Token 0 is the class token.

    Attributes:
        weights: attention among the 1 + N tokens, [B, 1 + N, 1 + N], mean over heads, rows sum to
            1, for each of `ATTENTIONS`.
        outputs: what each of `MODULES` adds to the path, through ln_post and projection,
            [B, 1 + N, C].
        grid: (h, w), N = h*w.
    """

    weights: dict[str, Tensor]
    outputs: dict[str, Tensor]
    grid: tuple[int, int]


def check_blocks(backbone: Backbone) -> None:
    """Refuse a backbone without the modules that `walk_blocks` shows: a ResNet.

    Raises:
        InvalidSetting: it is one.
    """
    if not backbone.tower.has_modules:
        raise InvalidSetting(
            f"{backbone.name}: a ResNet has no attention and FFN modules to look into"
        )


def walk_blocks(backbone: Backbone, images: Tensor, see: Callable[[BlockView], None]) -> None:
    """Show the blocks of a ViT from first to last. The recipe of the backbone plays no part.

    Args:
        backbone: whose tower has such blocks.
        images: [B, 3, H, W] as `encode_image` takes them.
        see: called with each block; what it does not keep is in memory for that long only.

    Raises:
        InvalidSetting: a ResNet, which has no such blocks.
    """
    check_blocks(backbone)
    grid = backbone.tower.grid((images.shape[2], images.shape[3]))
    backbone.walk(images, _Look(backbone.tower, grid, see))


class _Look(Visitor):
    """Makes a `BlockView` of every block."""

    apart = True

    def __init__(
        self, tower: Tower, grid: tuple[int, int], see: Callable[[BlockView], None]
    ) -> None:
        self.tower, self.grid, self.see = tower, grid, see

    def leave(self, step: Step) -> None:
        assert step.attended is not None  # both are there, since they are wanted apart
        assert step.fed is not None
        weights = {
            "raw": _mean_attention(step.q, step.k),
            "consistent": _mean_attention(step.v, step.v),
        }
        outputs = {
            "attention": self.tower.project(step.attended),
            "ffn": self.tower.project(step.fed),
        }
        self.see(BlockView(weights, outputs, self.grid))


def cells(masks: Tensor, grid: tuple[int, int]) -> Tensor:
    """Masks bool [P, H, W] as shares of the cells of a grid (h, w) that they cover: [P, h*w]."""
    return F.adaptive_avg_pool2d(masks[None].float(), grid)[0].flatten(1)


def foreground_selection(weights: Tensor, foreground: Tensor, valid: Tensor) -> Tensor:
    """How much of the attention of an object's patches falls on the object (FSR, Eq. 4).

    Means over the object's cells, one for each of `RATIOS`:
        weight: share of the attention weight that lies on the object;
        others: the same without the asking patch itself, which v-v attention favours trivially;
        top: share of the k strongest cells that are the object's, k being the object's size.
    The share of the object in the image is what attention that sees nothing would score. Objects of
    fewer than two cells, or of all that count, have no answer: NaN.

    Three readings of one name: `weight`, the one that needs no choice of a cut, is what we call
    mFSR; it is averaged over the images of a class and then over classes, for every block.

    Args:
        weights: [N, N], attention of patches (rows) to patches; rows need not sum to 1.
        foreground: bool [P, N], the cells of P objects.
        valid: bool [P, N], those that count at all.

    Returns:
        [P, 3], in [0, 1].
    """
    rows = []
    for inside, counted in zip(foreground & valid, valid, strict=True):
        size = int(inside.sum())
        if size < 2 or size == int(counted.sum()):
            rows.append(torch.full((3,), torch.nan, device=weights.device))
            continue
        asked = widen(weights[inside][:, counted])
        own = inside[counted]
        itself = torch.zeros_like(asked, dtype=torch.bool)
        itself[torch.arange(size, device=own.device), own.nonzero()[:, 0]] = True
        others = asked.masked_fill(itself, 0.0)
        top = own[asked.topk(size, dim=1).indices].float()
        ratios = (_share(asked, own), _share(others, own), top.mean(dim=1))
        rows.append(torch.stack([ratio.mean() for ratio in ratios]))
    return torch.stack(rows) if rows else weights.new_zeros(0, 3)


def affinity(output: Tensor, text: Tensor) -> Tensor:
    """Cosine of a module's output with texts (Eq. 5), of the class token and of patches.

    Args:
        output: [1 + N, C], projected.
        text: [P, C].

    Returns:
        [P, 2], in [-1, 1], in the order of `TOKENS`; the second is the mean over all patches.
    """
    with torch.autocast(output.device.type, enabled=False):
        cosines = F.normalize(widen(output), dim=-1) @ F.normalize(widen(text), dim=-1).T
    return torch.stack([cosines[0], cosines[1:].mean(dim=0)], dim=1)


def map_likeness(similarity: Tensor, reference: Tensor) -> Tensor:
    """How like the maps of texts are to that of the empty text (Fig. 6).

    The maps are scaled to [0, 1] as they are shown.

    Args:
        similarity: [N, P], on the token grid.
        reference: [N], that of the empty text.

    Returns:
        [P, 2]: first their cosine, in [0, 1], then their correlation, in [-1, 1], which is 0 for
        maps that have nothing to do with each other. Constant maps give 0.
    """
    grid = (len(reference), 1)
    both = torch.cat([similarity, reference[:, None]], dim=1)[None]
    maps = similarity_map(both, grid, grid)[0].flatten(1)
    centred = maps - maps.mean(dim=1, keepdim=True)
    return torch.stack([F.cosine_similarity(m[:-1], m[-1:], dim=1) for m in (maps, centred)], dim=1)


def _mean_attention(asks: Tensor, keys: Tensor) -> Tensor:
    """softmax(a . b / sqrt(d_head)) of [B, heads, L, d_head], mean over heads, in float32."""
    with torch.autocast(asks.device.type, enabled=False):
        logits = widen(asks) @ widen(keys).transpose(-2, -1)
        return (logits * asks.shape[-1] ** -0.5).softmax(dim=-1).mean(dim=1)


def _share(weights: Tensor, own: Tensor) -> Tensor:
    """Share of each row's weight [n, M] that lies on the cells `own` [M]; 0 for rows of zeros."""
    total = weights.sum(dim=1)
    return weights[:, own].sum(dim=1) / total.clamp_min(torch.finfo(total.dtype).tiny)
