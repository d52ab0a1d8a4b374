"""Similarities of one image after the other."""

from collections.abc import Callable

import torch
from torch import Tensor

from surgery.towers import ImageTokens


def image_by_image(tokens: ImageTokens, score: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Similarities on the token grid, each image by itself.

    In one product for all of a batch, an image's last digits would depend on how many others there
    are. A GPU takes all at once: there, they do so in the encoder already, and starting a product
    takes longer than the product.

    Args:
        tokens: of B images.
        score: patch tokens [1, N, C] and class token [1, C] of one image to similarities [1, N, T].

    Returns:
        [B, T, h, w].
    """
    if tokens.patch_tokens.device.type != "cpu":
        scores = score(tokens.patch_tokens, tokens.class_token)
        return scores.transpose(1, 2).unflatten(2, tokens.grid)
    pairs = zip(tokens.patch_tokens.split(1), tokens.class_token.split(1), strict=True)
    scores = torch.cat([score(patches, token) for patches, token in pairs])
    return scores.transpose(1, 2).unflatten(2, tokens.grid)
