"""RF-CLIP's score: texts moved towards what an image shows of them (liblacklucy/RF-CLIP)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from surgery.backbone import Backbone
from surgery.features import similarity
from surgery.precision import widen
from surgery.towers import ImageTokens
from surgery.windows import Compare, Window, class_similarities

CLUSTER_DISTANCE = 0.22
"""1 - cosine from which texts are of different clusters."""

_BEST = 2
_SHARE = 0.05
_WHOLE = 0.3


def text_clusters(text: Tensor, distance: float = CLUSTER_DISTANCE) -> Tensor:
    """Groups of texts that are alike, by complete linkage of 1 - cosine.

    Args:
        text: [T, C].
        distance: of two texts that can't be of one group.

    Returns:
        int64 [T], the group of each.
    """
    if len(text) < 2:
        return torch.zeros(len(text), dtype=torch.int64, device=text.device)
    from scipy.cluster.hierarchy import fcluster, linkage  # slow to import

    unit = F.normalize(widen(text.detach()), dim=-1)
    apart = 1 - unit @ unit.T
    rows, columns = torch.triu_indices(len(text), len(text), offset=1)
    condensed = apart[rows, columns].clamp(min=0).cpu().double().numpy()
    groups = fcluster(linkage(condensed, method="complete"), distance, criterion="distance")
    return torch.from_numpy(groups).to(text.device, torch.int64) - 1


def adapted_texts(
    patch_tokens: Tensor, whole: Tensor, text: Tensor, clusters: Tensor, share: float = _SHARE
) -> Tensor:
    """Texts of which each group's foremost one has moved towards its 2 best cells.

    Args:
        patch_tokens: [B, N, C].
        whole: [B, T], cosines of the image's class token with the texts.
        text: [T, C].
        clusters: int64 [T], of `text_clusters`.
        share: how much of the unit mean of these cells is mixed in.

    Returns:
        [B, T, C], unit vectors.
    """
    cells, text = F.normalize(widen(patch_tokens), dim=-1), F.normalize(widen(text), dim=-1)
    groups = F.one_hot(clusters).T.bool()  # [groups, T]
    foremost = whole[:, None].masked_fill(~groups, -torch.inf).argmax(dim=2)  # [B, groups]
    with torch.autocast(cells.device.type, enabled=False):
        best = (cells @ text.T).topk(min(_BEST, cells.shape[1]), dim=1).indices  # [B, 2, T]
    images = torch.arange(len(cells), device=cells.device)[:, None, None]
    towards = F.normalize(cells[images, best].mean(dim=1), dim=-1)  # [B, T, C]
    moved = F.normalize((1 - share) * text + share * towards, dim=-1)
    chosen = torch.zeros_like(whole, dtype=torch.bool).scatter(1, foremost, True)
    return torch.where(chosen[..., None], moved, text)


def adapted_scores(
    patch_tokens: Tensor, whole: Tensor, text: Tensor, clusters: Tensor, share: float = _WHOLE
) -> Tensor:
    """0.7 x cosine of each cell with the image's own texts + 0.3 x that of the whole image.

    Args:
        patch_tokens: [B, N, C], of images or windows of them.
        whole: [B, T], cosines of the class tokens of the whole images with the texts.
        text: [T, C].
        clusters: int64 [T], of `text_clusters`.
        share: of the whole image.

    Returns:
        [B, N, T] in [-1, 1].
    """
    own = adapted_texts(patch_tokens, whole, text, clusters)
    scores = [
        similarity(cells[None], texts)[0] for cells, texts in zip(patch_tokens, own, strict=True)
    ]
    return (1 - share) * torch.stack(scores) + share * widen(whole)[:, None]


def compare_adapted(
    backbone: Backbone,
    images: Sequence[Tensor],
    windows: Sequence[Sequence[Window]],
    text: Tensor,
    clusters: Tensor,
    *,
    rest: Literal["pad", "drop"] = "pad",
) -> Compare:
    """Compares windows with texts by `adapted_scores`, for `window_similarities`.

    Args:
        backbone: that encodes whole images, where a window is not all of its image.
        images: uint8 [3, H, W], of any sizes.
        windows: of each image.
        text: [T, C].
        clusters: int64 [T], of `text_clusters`.
        rest: as of `window_similarities`.
    """
    seen_whole = all(len(boxes) == 1 for boxes in windows)
    whole = None if seen_whole else class_similarities(backbone, images, text, rest=rest)

    def compare(tokens: ImageTokens, chosen: list[int]) -> Tensor:
        own = similarity(tokens.class_token[:, None], text)[:, 0]
        of_image = own if whole is None else whole[chosen]
        return adapted_scores(tokens.patch_tokens, of_image, text, clusters)

    return compare
