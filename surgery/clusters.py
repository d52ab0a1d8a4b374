"""CLIPtrase's clusters: cells that correlate become regions of one label (leaves162/CLIPtrase)."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common.errors import InvalidSetting
from surgery.backbone import Backbone
from surgery.precision import widen
from surgery.towers import Step, Visitor
from surgery.windows import whole_patches

NOISE = -1
"""The cluster of cells that are of none."""

_ENLARGED = 4
_MEDIAN = 7


def correlations(backbone: Backbone, images: Tensor) -> Tensor:
    """How cells correlate in the last block but one, beyond what the class token does with each.

    With c the mean over heads, and over q-q, k-k and v-v, of cosines: c(i, j) - c(class, j), negatives 0.

    Args:
        backbone: of a ViT with a class token; its recipe says how position embeddings are resized.
        images: [B, 3, H, W], normalised.

    Returns:
        [B, N, N] in float32.

    Raises:
        InvalidSetting: the tower is another.
    """
    tower = backbone.tower
    if tower.depth < 2 or not tower.has_class_token:
        raise InvalidSetting(
            "CLIPtrase's clusters are read before the last block of a ViT with a class token"
        )
    seen = _Correlation(tower.depth - 2)
    backbone.walk(images, seen)
    return seen.found


def cluster_cells(correlation: Tensor, eps: float, least: int = 3) -> Tensor:
    """DBSCAN of the rows of an image's correlations, by Euclidean distance.

    Args:
        correlation: [N, N].
        eps: neighbours are not farther than this.
        least: a cell with so many neighbours, itself among them, is at the core of a cluster.

    Returns:
        int64 [N] on the CPU: clusters from 0 on, in the order of their first core cells, or `NOISE`.
    """
    from scipy.sparse import csr_array  # slow to import
    from scipy.sparse.csgraph import connected_components

    rows = correlation.cpu().double()
    near = (torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist") <= eps).numpy()
    core = near.sum(axis=1) >= least
    _, part = connected_components(csr_array(near[np.ix_(core, core)]), directed=False)
    found = np.full(len(rows), NOISE)
    if core.any():
        _, first, part = np.unique(part, return_index=True, return_inverse=True)
        found[core] = np.argsort(np.argsort(first))[part]
        # Others are of the first cluster that has a core cell near them.
        reach = np.where(near[:, core], found[core][None], len(rows)).min(axis=1)
        found = np.where(~core & (reach < len(rows)), reach, found)
    return torch.from_numpy(found)


def one_label_a_cluster(
    labels: Tensor, correlation: Tensor, clusters: Tensor, grid: tuple[int, int]
) -> Tensor:
    """A label map in which each cluster's region has its commonest label, the smallest of equals.

    The mean of a cluster's rows is enlarged four times bilinearly, passes a median filter of 7 x 7, and
    is enlarged to the map's size; a pixel is of the cluster whose map is largest there.

    Args:
        labels: int64 [H, W], 0 or more.
        correlation: [N, N].
        clusters: [N], of `cluster_cells`; without one nothing changes.
        grid: (h, w).

    Returns:
        int64 [H, W].
    """
    from scipy.ndimage import median_filter

    count = int(clusters.max()) + 1
    if not count:
        return labels
    members = F.one_hot(clusters.to(correlation.device) + 1, count + 1)[:, 1:].to(correlation.dtype)
    means = (members.T @ correlation / members.sum(dim=0)[:, None]).unflatten(1, grid)[None]
    maps = F.interpolate(means, scale_factor=_ENLARGED, mode="bilinear", align_corners=False)
    smooth = np.stack([median_filter(one, size=_MEDIAN) for one in maps[0].cpu().numpy()])
    size = (labels.shape[0], labels.shape[1])
    maps = torch.from_numpy(smooth)[None].to(labels.device)
    region = F.interpolate(maps, size=size, mode="bilinear", align_corners=False)[0].argmax(dim=0)
    most = int(labels.max()) + 1
    votes = torch.bincount((region * most + labels).flatten(), minlength=count * most)
    return votes.view(count, most).argmax(dim=1)[region]


def label_clusters(
    backbone: Backbone,
    image: Tensor,
    labels: Tensor,
    eps: float,
    *,
    rest: Literal["pad", "drop"] = "pad",
) -> Tensor:
    """The label map of an image in which each cluster of cells has one label.

    Args:
        backbone: as of `correlations`.
        image: uint8 [3, S, S'].
        labels: int64 [H, W], 0 or more.
        eps: as of `cluster_cells`.
        rest: what becomes of the image's border that patches don't divide, see `window_similarities`.

    Returns:
        int64 [H, W].

    Raises:
        InvalidSetting: the tower is another.
    """
    pixels = whole_patches(backbone.preprocess(image[None]), backbone.patch_size, rest)
    (correlation,) = correlations(backbone, pixels)
    grid = backbone.tower.grid((pixels.shape[2], pixels.shape[3]))
    return one_label_a_cluster(labels, correlation, cluster_cells(correlation, eps), grid)


class _Correlation(Visitor):
    """Correlations of one block's projections."""

    found: Tensor

    def __init__(self, index: int) -> None:
        self.index = index

    def attend(self, step: Step) -> Tensor:
        if step.index == self.index:
            unit = [F.normalize(widen(x), dim=-1) for x in (step.q, step.k, step.v)]
            total = sum(
                (x @ x.transpose(-2, -1) for x in unit[1:]), unit[0] @ unit[0].transpose(-2, -1)
            )
            mean = total.mean(dim=1) / 3
            self.found = (mean[:, 1:, 1:] - mean[:, :1, 1:]).clamp(min=0)
        return super().attend(step)
