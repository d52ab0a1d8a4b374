"""Plain CLIP: what the paper compares with."""

from torch import Tensor

from surgery.backbone import Backbone
from surgery.features import similarity
from surgery.methods._images import image_by_image
from surgery.texts import Texts


def explain(backbone: Backbone, images: Tensor, texts: Texts) -> Tensor:
    """Cosine of plain CLIP's patch tokens with texts.

    Args:
        backbone: whose recipe plays no part.
        images: [B, 3, H, W], normalised.
        texts: T of them.

    Returns:
        [B, T, h, w], in [-1, 1].
    """
    tokens = backbone.with_attention("raw").encode_image(images)
    return image_by_image(tokens, lambda patches, _: similarity(patches, texts.features))
