"""Plain CLIP's map reversed, since it shows the background of photographs (RCLIP of the paper)."""

from torch import Tensor

from surgery.backbone import Backbone
from surgery.methods import clip
from surgery.texts import Texts


def explain(backbone: Backbone, images: Tensor, texts: Texts) -> Tensor:
    """`clip` with the opposite sign: [B, T, h, w], in [-1, 1]."""
    return -clip.explain(backbone, images, texts)
