"""Answers as HTML: pictures beside each other with their names, everything that was typed escaped."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from html import escape

import numpy as np
import torch
from PIL import Image

from surgery.explanation import CaptionExplanation, Explanation
from surgery.visualize import colours, heat_map
from tasks._draw import Look, caption_figure, point_figure
from tasks.app.answers import Answer, points_of
from tasks.measures.multimodal import TOP

HEAT, MASK, POINTS, SAM = "Heat map", "Mask", "Points", "SAM"


@dataclass(frozen=True)
class View:
    """How maps are shown.

    Attributes:
        kind: `HEAT`, `MASK` (what is below the threshold is darkened), `POINTS`, or `SAM` (points, and
            what is not in their mask is darkened).
        opacity: share of the heat's colours, in [0, 1].
        colour_map: of heat, see `surgery.visualize.colours`.
        mask_from: map value in [0, 1] from which a place is in the mask.
        points_from: map value in [0, 1] from which a place is a positive point.
    """

    kind: str = HEAT
    opacity: float = 0.6
    colour_map: str = "viridis"
    mask_from: float = 0.5
    points_from: float = 0.8


Masks = dict[str, list[tuple[np.ndarray, float]]]


def maps_page(answer: Answer, view: View, masks: Masks | None = None) -> str:
    """For each name its score, and a picture by each method.

    Args:
        answer: what was found.
        view: how it is shown.
        masks: SAM's, see `Answers.sam_masks`.
    """
    found = answer.explanation
    parts = []
    for i, name in enumerate(found.names):
        told = f"{answer.counts[i]} times" if answer.counts else f"cosine {found.scores[i]:.3f}"
        pictures = []
        for method in found.methods:
            mask, estimate = (masks or {}).get(method, [(None, 0.0)] * len(found.names))[i]
            pixels, words = draw(found, method, i, view, mask)
            if mask is not None:
                words += f", SAM expects an IoU of {estimate:.2f}"
            said = f"{view.kind} of {name} by {method}: {words}"
            pictures.append(_figure(pixels, said, f"<b>{escape(method)}</b> {escape(words)}"))
        parts.append(
            f"<section><h3>{escape(name)} <small>{escape(told)}</small></h3>"
            f'<div class="panels">{"".join(pictures)}</div></section>'
        )
    legend = _legend(view)
    columns = len(found.methods)
    return f'{legend}<div class="maps" style="--methods:{columns}">{"".join(parts)}</div>'


def draw(
    found: Explanation, method: str, index: int, view: View, mask: np.ndarray | None = None
) -> tuple[np.ndarray, str]:
    """One map as pixels uint8 [H, W, 3], and what is to be seen in a few words."""
    values = found.methods[method].maps[index]
    if view.kind == HEAT:
        heat = heat_map(found.image, values, opacity=view.opacity, colour_map=view.colour_map)
        return heat.numpy(), ""
    image, size = found.image.permute(2, 0, 1), (values.shape[0], values.shape[1])
    if view.kind == MASK:
        inside = (values >= view.mask_from).numpy()
        return point_figure(image, size, [], [], inside), f"{inside.mean():.0%} of the picture"
    points, labels = points_of(found, method, index, view.points_from)
    pixels = point_figure(image, size, points.tolist(), labels.tolist(), mask)
    return pixels, f"{int(labels.sum())} on it, {int((1 - labels).sum())} off it"


def caption_page(found: CaptionExplanation, position: int, view: View) -> str:
    """A caption with its best tokens coloured, and the map of one of them, as in Figure 11."""
    best, chosen = found.order[:TOP], found.tokens[position]
    look = Look(view.opacity, view.colour_map)
    image = found.image.permute(2, 0, 1)
    pixels = caption_figure(image, found.map(position), list(found.tokens), best, look)
    said = f"The picture, where {chosen} is, and the caption with its best tokens coloured"
    told = f"Where <b>{escape(chosen)}</b> is; red, yellow and blue are the best three tokens."
    return f'{_legend(view)}<div class="caption">{_figure(pixels, said, told)}</div>'


def token_choices(found: CaptionExplanation) -> list[tuple[str, int]]:
    """Each token of a caption with its rank and its score, and its position."""
    ranks = {position: rank + 1 for rank, position in enumerate(found.order)}
    return [
        (f"{token}  {ranks[i]}.  {found.scores[i]:.3f}", i) for i, token in enumerate(found.tokens)
    ]


def notice_page(text: str, *, error: bool = False) -> str:
    """A sentence for the person in front of the page; nothing of an empty one."""
    if not text:
        return ""
    role, kind = ("alert", "error") if error else ("status", "warning")
    return f'<p class="notice {kind}" role="{role}">{escape(text)}</p>'


def _legend(view: View) -> str:
    if view.kind != HEAT:
        return ""
    steps = colours(torch.linspace(0, 1, 9), view.colour_map).tolist()
    stops = ", ".join(f"rgb({r}, {g}, {b})" for r, g, b in steps)
    return f'<p class="legend">0 <span style="background:linear-gradient(90deg, {stops})"></span> 1</p>'


def _figure(pixels: np.ndarray, said: str, told: str) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="JPEG", quality=88)
    data = base64.b64encode(buffer.getvalue()).decode()
    return (
        f'<figure><img alt="{escape(said)}" src="data:image/jpeg;base64,{data}">'
        f"<figcaption>{told}</figcaption></figure>"
    )
