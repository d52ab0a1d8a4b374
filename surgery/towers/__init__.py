"""CLIP's image towers: one class each, one loop over the blocks each.

`Tower.run` walks through the blocks, and calls a `Visitor` at each. The recipes' new path is such a
visitor (`Tower.encode`), the paper's analyses are, and so is whatever else needs tokens, attention or
gradients of some layer. A new tower is a file with a class, and a row in `TOWERS`.
"""

from typing import Any

from common.errors import InvalidSetting
from surgery.towers._positions import resize_positions
from surgery.towers._tower import (
    ImageTokens,
    Plan,
    Step,
    Tower,
    Visitor,
    merge_heads,
    split_heads,
)
from surgery.towers.eva import Eva
from surgery.towers.open_clip_vit import OpenClipViT
from surgery.towers.resnet import ResNet
from surgery.towers.timm_vit import TimmViT
from surgery.towers.vit import ViT

__all__ = [
    "TOWERS",
    "Eva",
    "ImageTokens",
    "OpenClipViT",
    "Plan",
    "ResNet",
    "Step",
    "TimmViT",
    "Tower",
    "ViT",
    "Visitor",
    "merge_heads",
    "resize_positions",
    "split_heads",
    "tower_of",
]

TOWERS: dict[str, type[Tower]] = {
    "ModifiedResNet": ResNet,
    "VisionTransformer": OpenClipViT,
    "timm VisionTransformer": TimmViT,
    "timm Eva": Eva,
}
"""Class name of open_clip's module, or of timm's behind it -> how its tokens are read."""


def tower_of(visual: Any) -> Tower:
    """The tower of an open_clip module.

    Args:
        visual: `model.visual`.

    Returns:
        The tower on its weights.

    Raises:
        InvalidSetting: there is no row for its class.
    """
    kind = type(visual).__name__
    if kind == "TimmModel":
        kind = f"timm {type(visual.trunk).__name__}"
    if kind not in TOWERS:
        raise InvalidSetting(f"image towers of the class {kind}: supported are {', '.join(TOWERS)}")
    return TOWERS[kind](visual)
