"""The formulas of recipes' attention: what the fields of a `Recipe` mean."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from surgery.precision import widen
from surgery.recipe import Recipe
from surgery.softmax_attention import softmax_attention


def attend(
    recipe: Recipe,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    start: int = 0,
    prefix: int = 1,
    bias: Tensor | None = None,
    temperature: Tensor | None = None,
    earlier: Tensor | None = None,
    agreement: Tensor | None = None,
) -> Tensor:
    """The new path's attention.

    Args:
        recipe: how.
        q: [B, heads, L, d_head].
        k: as ``q``.
        v: as ``q``.
        start: the first token that is a query (1 leaves the class token out; it is always a key).
        prefix: how many tokens are before the cells: the class token, or none.
        bias: [L, L], added to the logits.
        temperature: [B, 1, 1, 1], what unit-length logits are multiplied with; needed when
            `recipe.iterations` > 0.
        earlier: [B, heads, L, L], attention made of earlier blocks', of the pair "earlier".
        agreement: [B, L, L], `label_agreement` of a first pass and 0 of tokens that are no cells, of a
            recipe with a `label_share`.

    Returns:
        [B, heads, L - start, d_head].
    """
    projections = {"q": q, "k": k, "v": v}
    mask = None if bias is None else bias[..., start:, :].to(q.dtype)
    shares = recipe.combine if isinstance(recipe.combine, tuple) else None
    total: Tensor | None = None
    for i, pair in enumerate(recipe.pairs):
        if pair == "identity":
            output = v[:, :, start:]
        elif pair == "near":
            if mask is None:
                raise ValueError('the pair "near" needs a bias')
            lengths = (widen(x).norm(dim=-1).mean(dim=-1) for x in (q, k))
            size = math.prod(lengths).mean(dim=1) * q.shape[-1] ** -0.5
            weights = (size[:, None, None] * mask).softmax(dim=-1)
            output = weights[:, None].to(v.dtype) @ v
        elif pair == "earlier":
            if earlier is None:
                raise ValueError('the pair "earlier" needs the attention of earlier blocks')
            output = earlier[:, :, start:].to(v.dtype) @ v
        else:
            queries, keys = projections[pair[0]], projections[pair[1]]
            scale = None
            if recipe.cosine_scale is not None:
                queries, keys = _unit(queries), _unit(keys)
                scale = recipe.cosine_scale * queries.shape[-1] ** -0.5
            if recipe.iterations:
                if temperature is None or pair[0] != pair[1]:
                    raise ValueError("iterations need a temperature and self-self pairs")
                queries, keys = _cluster(queries, temperature, recipe.iterations)
                scale = 1.0
            own = mask
            if agreement is not None:
                scale = recipe.label_scale * (1 - recipe.label_share) * queries.shape[-1] ** -0.5
                # The released code has this one product in 16 bits.
                more = (agreement.half() * recipe.label_share).float()[:, None, start:]
                more = (recipe.label_scale * more).to(q.dtype)
                own = more if mask is None else mask + more
            if recipe.alignment_rounds != 0:
                keys, centred = aligned(queries, keys, recipe.alignment_rounds, prefix)
                more = recipe.alpha * centred[:, :, start:] @ centred.transpose(-2, -1)
                more = (more * queries.shape[-1] ** -0.5).to(q.dtype)
                own = more if mask is None else mask + more
            output = softmax_attention(queries[:, :, start:], keys, v, own, scale=scale)
        output = output if shares is None else shares[i] * output
        total = output if total is None else total + output
    if total is None:
        raise ValueError("a recipe without pairs has no new path")
    many = len(recipe.pairs) > 1 and recipe.combine == "mean"
    return total / len(recipe.pairs) if many else total


def _unit(x: Tensor) -> Tensor:
    """Unit vectors, with the released code's guard against zeros."""
    x32 = x.float()
    return (x32 / (x32.norm(dim=-1, keepdim=True) + 1e-6)).to(x.dtype)


def _cluster(x: Tensor, temperature: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """GEM's self-self attention on unit vectors; returns queries (times temperature) and keys."""
    x = F.normalize(x.float(), dim=-1).to(x.dtype)
    for _ in range(iterations):
        x = softmax_attention(x * temperature.to(x.dtype), x, x, scale=1.0)
        x = F.normalize(x.float(), dim=-1).to(x.dtype)
    return x * temperature.to(x.dtype), x


def aligned(q: Tensor, k: Tensor, rounds: int | None, prefix: int) -> tuple[Tensor, Tensor]:
    """PEARL's alignment of keys with queries, per head, in float32.

    With w = lengths of q, 0 for the class token, divided by their sum, and q', k' without their weighted
    mean: M = k'^T q' (d_head x d_head) and R = M (M^T M)^(-1/2), of which the inverse root is found by
    Newton-Schulz rounds. The released 5 are far from converged, and part of the method.

    Args:
        q: [B, heads, L, d_head].
        k: of the same shape.
        rounds: of Newton-Schulz; None: R = U V^T of the singular value decomposition M = U S V^T.
        prefix: how many tokens are before the cells.

    Returns:
        k R in their precision, and k' in float32; [B, heads, L, d_head] each.
    """
    with torch.autocast(q.device.type, enabled=False):
        queries, keys = widen(q), widen(k)
        weights = queries.norm(dim=-1, keepdim=True)
        weights[:, :, :prefix] = 0
        weights = weights / (weights.sum(dim=2, keepdim=True) + 1e-6)
        queries, centred = (x - (weights * x).sum(dim=2, keepdim=True) for x in (queries, keys))
        turn = centred.transpose(-2, -1) @ queries
        if rounds is None:
            u, _, vh = torch.linalg.svd(turn, full_matrices=False)
            return (keys @ u @ vh).to(k.dtype), centred
        square = turn.transpose(-2, -1) @ turn
        size = square.norm(dim=(-2, -1), keepdim=True)
        one = torch.eye(q.shape[-1], dtype=square.dtype, device=square.device)
        root, inverse = square / size + 1e-6 * one, one
        for _ in range(rounds):
            step = (3 * one - inverse @ root) / 2
            root, inverse = root @ step, step @ inverse
        return (keys @ (turn @ inverse / size.sqrt())).to(k.dtype), centred


def balanced(weights: Tensor, rounds: int) -> Tensor:
    """CLIPer's attention, from the sum of that of earlier blocks, in float32.

    Columns and rows are divided by their sums, in turns; R of the last round gives C = (R + R^T) / 2, of
    which each column loses its mean, what is negative, and each row is divided by its sum.

    Args:
        weights: [B, heads, L, L].
        rounds: as many as blocks: the released code divides in place, once more for each of the layers
            whose tokens it makes, and the last layer's are those that count.

    Returns:
        [B, heads, L, L], rows sum to 1.
    """
    for _ in range(rounds):
        weights = balance(weights)
    return above_mean(weights)


def balance(weights: Tensor) -> Tensor:
    """One round of `balanced`: columns, and then rows, divided by their sums."""
    weights = weights / weights.sum(dim=-2, keepdim=True)
    return weights / weights.sum(dim=-1, keepdim=True)


def above_mean(weights: Tensor) -> Tensor:
    """The end of `balanced`: C of R."""
    found = (weights + weights.transpose(-2, -1)) / 2
    found = (found - found.mean(dim=-2, keepdim=True)).clamp(min=0)
    return found / found.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(found.dtype).tiny)


def neighbour_bias(
    grid: tuple[int, int], std: float, device: torch.device, *, prefix: int = 1
) -> Tensor:
    """NACLIP's omega [prefix + h*w, prefix + h*w] in float32: exp(-distance^2 / (2 std^2)) between cells.

    Distances are in cells; rows and columns of the tokens before the cells (the class token) are 0.
    """
    rows, columns = torch.meshgrid(
        *(torch.arange(n, dtype=torch.float32, device=device) for n in grid), indexing="ij"
    )
    cells = torch.stack([rows.flatten(), columns.flatten()], dim=1)
    squared = (cells[:, None] - cells[None]).square().sum(-1)
    return F.pad(torch.exp(-squared / (2 * std**2)), (prefix, 0, prefix, 0))
