"""Heat maps over images, with torch alone."""

import torch
from torch import Tensor


def jet(values: Tensor) -> Tensor:
    """Colours of values in [0, 1] from blue over green and yellow to red: uint8 [..., 3].

    Example:
        >>> jet(torch.tensor([0.0, 0.5, 1.0])).tolist()
        [[0, 0, 128], [128, 255, 128], [128, 0, 0]]
    """
    # Each channel is a trapezoid, centred on 3/4 (red), 1/2 (green) and 1/4 (blue).
    centres = torch.tensor([0.75, 0.5, 0.25], device=values.device)
    colours = 1.5 - 4 * (values.float()[..., None].clamp(0, 1) - centres).abs()
    return colours.clamp(0, 1).mul(255).round().to(torch.uint8)


def heat_map(image: Tensor, values: Tensor, *, opacity: float = 0.6) -> Tensor:
    """A similarity map laid over its image.

    Args:
        image: uint8 [H, W, 3].
        values: [H, W] in [0, 1].
        opacity: share of the colours in [0, 1].

    Returns:
        uint8 [H, W, 3].

    Raises:
        ValueError: the image is of another type or size.
    """
    if image.dtype != torch.uint8 or image.shape != (*values.shape, 3):
        raise ValueError(
            f"expected an image uint8 [{', '.join(map(str, values.shape))}, 3], "
            f"given {image.dtype} {list(image.shape)}"
        )
    mixed = image.float().lerp(jet(values).float(), opacity)
    return mixed.round().to(torch.uint8)
