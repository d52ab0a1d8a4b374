"""From tokens and texts to similarities, maps and points: the formulas of CLIP Surgery.

All are computed in float32 even under autocast (float64 stays float64), and normalise the
features they are given themselves.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from surgery.precision import widen


def similarity(patch_tokens: Tensor, text: Tensor) -> Tensor:
    """Cosine of patch tokens with texts.

    Args:
        patch_tokens: [B, N, C].
        text: [T, C], or [B, T, C], of each image its own.

    Returns:
        [B, N, T], in [-1, 1].

    Raises:
        ValueError: shapes that do not fit.

    Example:
        >>> patches = torch.tensor([[[2.0, 0.0], [3.0, 3.0]]])
        >>> similarity(patches, torch.tensor([[5.0, 0.0], [0.0, -1.0]]))
        tensor([[[ 1.0000,  0.0000],
                 [ 0.7071, -0.7071]]])
    """
    _check(patch_tokens, None, text)
    with torch.autocast(patch_tokens.device.type, enabled=False):
        return _unit(patch_tokens) @ _unit(text).mT


def feature_surgery(
    patch_tokens: Tensor,
    class_token: Tensor,
    text: Tensor,
    *,
    redundant: Tensor | None = None,
    tau: float = 2.0,
    form: Literal["code", "paper"] = "code",
) -> Tensor:
    """Similarity of patches and texts without the features that all texts share.

    With unit vectors f (patch), c (class token), t (text), w = softmax over texts of tau c.t,
    divided by its mean over texts (Section 3.3 of arXiv 2304.05653):
        form "code" (as released):       w f.t - f.mean_t(w t)
        form "paper" (Equations 8-11):     f.t - f.mean_t(w t)
    The sums over channels are taken first, so that memory stays O(B N T).

    Args:
        patch_tokens: [B, N, C].
        class_token: [B, C].
        text: [T, C]; with `redundant` also [B, T, C], of each image its own.
        redundant: [1, C], the feature of the empty text, for single texts: f.(t - redundant), with
            neither weights nor form. Without it, one text alone is refused.
        tau: temperature of the weights.
        form: "code" or "paper".

    Returns:
        [B, N, T], signed.

    Raises:
        ValueError: shapes that do not fit, or one text and nothing that it is compared with.

    Example:
        >>> patches, token = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]]), torch.tensor([[1.0, 0.0]])
        >>> feature_surgery(patches, token, torch.eye(2), form="paper")
        tensor([[[ 0.1192, -0.8808],
                 [-0.1192,  0.8808]]])
    """
    _check(patch_tokens, class_token, text)
    _check_form(form)
    with torch.autocast(patch_tokens.device.type, enabled=False):
        f, t = _unit(patch_tokens), _unit(text)
        if redundant is not None:
            if redundant.shape != (1, text.shape[-1]):
                raise ValueError(
                    f"redundant: expected [1, {text.shape[-1]}], given {list(redundant.shape)}"
                )
            return f @ (t - _unit(redundant)).mT
        if text.ndim > 2:
            raise ValueError("texts of each image's own need what is redundant in them")
        if len(text) == 1:
            raise ValueError(
                "one text has nothing to share with others, its similarity would be 0 everywhere; "
                "pass redundant=backbone.encode_text(tokenizer([''])), the empty text's feature"
            )
        weights = (tau * _unit(class_token) @ t.T).softmax(dim=-1)
        weights = weights / weights.mean(dim=-1, keepdim=True)
        shared = f @ (weights @ t / len(t))[:, :, None]
        scores = f @ t.T
        if form == "code":
            scores = scores * weights[:, None]
        return scores - shared


def prediction_surgery(
    predictions: Tensor, *, tau: float = 2.0, form: Literal["code", "paper"] = "code"
) -> Tensor:
    """Predictions of an image's classes without what all classes have in common.

    `feature_surgery` with the class token in place of patches (multi-label recognition): there it only
    needs the scores s = c.t, and so it serves any other predictions too, such as `merged_predictions`.
    With w = softmax over texts of tau s, divided by its mean over texts:
        form "code" (as released):       w s - mean_t(w s)
        form "paper" (Equations 8-11):     s - mean_t(w s)

    Args:
        predictions: [B, T], cosines or the like.
        tau: temperature of the weights.
        form: "code" or "paper".

    Returns:
        [B, T], signed.

    Raises:
        ValueError: another shape, or another form.

    Example:
        >>> prediction_surgery(torch.tensor([[0.3, 0.1, 0.2]]), form="paper")
        tensor([[ 0.0868, -0.1132, -0.0132]])
    """
    if predictions.ndim != 2 or predictions.shape[1] < 2:
        raise ValueError(
            f"predictions: expected [B, T] of two or more texts, given {list(predictions.shape)}"
        )
    _check_form(form)
    with torch.autocast(predictions.device.type, enabled=False):
        scores = widen(predictions)
        weights = (tau * scores).softmax(dim=-1)
        weighted = scores * weights / weights.mean(dim=-1, keepdim=True)
        return (weighted if form == "code" else scores) - weighted.mean(dim=-1, keepdim=True)


def merged_predictions(
    patch_tokens: Tensor,
    class_token: Tensor,
    text: Tensor,
    local_text: Tensor,
    *,
    sharpness: float = 50.0,
) -> Tensor:
    """Global and local predictions of TaI-DPT, merged half and half (Guo et al. 2023).

    With unit vectors f (patch), c (class token), t and t' (global and local text):
    (c.t + sum over patches of p f.t') / 2, p = softmax over patches of sharpness f.t'.

    Args:
        patch_tokens: [B, N, C].
        class_token: [B, C].
        text: [T, C], learned for whole images.
        local_text: [T, C], learned for places.
        sharpness: how much the best places count for.

    Returns:
        [B, T], in [-1, 1].

    Raises:
        ValueError: shapes that do not fit.

    Example:
        >>> patches, token = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]]), torch.tensor([[1.0, 0.0]])
        >>> merged_predictions(patches, token, torch.eye(2), torch.eye(2))
        tensor([[1.0000, 0.5000]])
    """
    _check(patch_tokens, class_token, text)
    _check(patch_tokens, class_token, local_text)
    if len(text) != len(local_text):
        raise ValueError(
            f"expected as many local texts as texts, {len(text)}, given {len(local_text)}"
        )
    local = similarity(patch_tokens, local_text)
    local = (local * (sharpness * local).softmax(dim=1)).sum(dim=1)
    return (similarity(class_token[:, None], text)[:, 0] + local) / 2


def min_max(maps: Tensor) -> Tensor:
    """Each map from its smallest to its largest value (the normalisation of Equation 1).

    Args:
        maps: [..., h, w].

    Returns:
        [..., h, w] in [0, 1]; a constant map gives zeros.

    Example:
        >>> min_max(torch.tensor([[-2.0, 0.0], [1.0, 2.0]]))
        tensor([[0.0000, 0.5000],
                [0.7500, 1.0000]])
    """
    low, high = maps.amin((-2, -1), keepdim=True), maps.amax((-2, -1), keepdim=True)
    span = high - low
    return (maps - low) / torch.where(span > 0, span, torch.ones_like(span))


def similarity_map(
    similarity: Tensor,
    grid: tuple[int, int],
    size: tuple[int, int],
    *,
    order: Literal["code", "paper"] = "code",
) -> Tensor:
    """Similarities on the token grid as maps of the image.

    Enlarging is bilinear without corner alignment.

    Args:
        similarity: [B, N, T], N = h*w; there may be no text.
        grid: (h, w).
        size: (H, W) of the maps.
        order: "code" (as released): each map is scaled to [0, 1] by its smallest and largest cell,
            and then enlarged; "paper" (Equation 1): enlarged first, which is `min_max` of the
            maps that "code" gives.

    Returns:
        [B, T, H, W] in [0, 1]; a constant map gives zeros.

    Raises:
        ValueError: similarities of another grid.

    Example:
        >>> similarity_map(torch.tensor([[[-2.0], [2.0]]]), (1, 2), (1, 4))
        tensor([[[[0.0000, 0.2500, 0.7500, 1.0000]]]])
    """
    if similarity.ndim != 3 or similarity.shape[1] != grid[0] * grid[1]:
        raise ValueError(
            f"similarity: expected [B, {grid[0] * grid[1]}, T] for grid {grid}, "
            f"given {list(similarity.shape)}"
        )
    if order not in ("code", "paper"):
        raise ValueError(f"order={order!r}: expected 'code' or 'paper'")
    # Scaling first does not change what scaling last gives, but keeps constant maps constant.
    maps = min_max(widen(similarity).transpose(1, 2).unflatten(-1, grid))
    if not maps.numel():  # torch enlarges nothing but what is there
        return maps.new_zeros(*maps.shape[:2], *size)
    if len(maps) == 1:  # else torch enlarges into one layout and copies that into another
        maps = maps.contiguous()
    maps = F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=False)
    return maps if order == "code" else min_max(maps)


def similarity_to_points(
    similarity: Tensor,
    grid: tuple[int, int],
    size: tuple[int, int],
    *,
    threshold: float = 0.8,
    down_sample: int = 2,
) -> tuple[Tensor, Tensor]:
    """Prompt points for an interactive segmenter, from one text's similarity.

    The map is shrunk by `down_sample`, scaled to [0, 1], and the cells of at least `threshold`
    (at most half of all) become positive points, as many of the weakest cells negative ones.
    Where the released `similarity_map_to_points` has no answer: a grid that would shrink to a
    single cell is not shrunk, and a constant map, which says nothing about where, gives no points.

    Args:
        similarity: [N], N = h*w.
        grid: (h, w).
        size: (H, W) of the image.
        threshold: in [0, 1].
        down_sample: how many times smaller the map becomes.

    Returns:
        Points [K, 2] int64, each (x, y) in pixels, and labels [K] int64, 1 positive and 0
        negative; positives first, both in rising order of score, as the released function orders
        them.

    Raises:
        ValueError: a similarity of another grid.

    Example:
        >>> one_bright_cell = torch.tensor([0.0, 0.1, 0.2, 0.9])
        >>> similarity_to_points(one_bright_cell, (2, 2), (8, 8), down_sample=1)
        (tensor([[6, 6],
                [2, 2]]), tensor([1, 0]))
    """
    if similarity.shape != (grid[0] * grid[1],):
        raise ValueError(
            f"similarity: expected [{grid[0] * grid[1]}] for grid {grid}, "
            f"given {list(similarity.shape)}"
        )
    cells = min_max(widen(similarity).view(1, 1, *grid))
    height, width = (max(side // down_sample, 1) for side in grid)
    if height * width == 1:
        height, width = grid
    cells = F.interpolate(cells, size=(height, width), mode="bilinear", align_corners=False)
    scores = min_max(cells)[0, 0].flatten()
    order = scores.argsort(stable=True)
    count = min(int((scores >= threshold).sum()), len(scores) // 2)
    if not scores.any():
        count = 0
    chosen = torch.cat([order[len(order) - count :], order[:count]])
    # Cell centres, cut to whole pixels; in integers, since (i + 0.5) * (W / w) may fall just short.
    x = (2 * (chosen % width) + 1) * size[1] // (2 * width)
    y = (2 * (chosen // width) + 1) * size[0] // (2 * height)
    labels = torch.zeros_like(chosen)
    labels[:count] = 1
    return torch.stack([x, y], dim=1), labels


def _unit(x: Tensor) -> Tensor:
    return F.normalize(widen(x), dim=-1)


def _check_form(form: str) -> None:
    if form not in ("code", "paper"):
        raise ValueError(f"form={form!r}: expected 'code' or 'paper'")


def _check(patch_tokens: Tensor, class_token: Tensor | None, text: Tensor) -> None:
    if patch_tokens.ndim != 3:
        raise ValueError(f"patch_tokens: expected [B, N, C], given {list(patch_tokens.shape)}")
    batch, _, channels = patch_tokens.shape
    own = text.shape[:-2] == (batch,)
    if not (text.ndim == 2 or own) or text.shape[-1] != channels:
        raise ValueError(f"text: expected [T, {channels}], given {list(text.shape)}")
    if class_token is not None and class_token.shape != (batch, channels):
        raise ValueError(
            f"class_token: expected [{batch}, {channels}], given {list(class_token.shape)}"
        )
