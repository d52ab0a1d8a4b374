"""What methods with gradients share: plain CLIP's scores, and the gradients of many texts at once."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from common.errors import InvalidSetting
from surgery.backbone import Backbone
from surgery.features import similarity
from surgery.towers import Step, Visitor

_NUMBERS_AT_ONCE = 2**26
"""How many numbers the gradients of some texts have together, at most: 256 MiB in float32."""


class Recorder(Visitor):
    """Lets gradients flow from block `first` on; what is before it records nothing.

    Attention is written out there: the fused one has no gradients for many texts at once.
    """

    reads_queries = False

    def __init__(self, first: int) -> None:
        self.first = first

    def enter(self, step: Step) -> None:
        """The tokens that enter the first block are where the graph begins."""
        if step.index == self.first:
            step.x = step.x.detach().requires_grad_()

    def attend(self, step: Step) -> Tensor:
        """CLIP's own attention; from the first block on as `see` does it."""
        return super().attend(step) if step.index < self.first else self.see(step)

    def see(self, step: Step) -> Tensor:
        """The attention of a step from the first block on, see `Visitor.attend`; to be kept here."""
        return step.weights() @ step.v


def class_cosines(backbone: Backbone, x: Tensor, text: Tensor) -> Tensor:
    """Cosines of the images' features (class tokens, as a rule) with texts.

    Args:
        backbone: whose projection it is.
        x: [B, L, D] tokens of the last block, as `Tower.run` returns them.
        text: [T, C].

    Returns:
        [B, T]; times `Backbone.logit_scale` they are CLIP's logits.
    """
    return similarity(backbone.tower.pool(x)[:, None], text)[:, 0]


def gradients(scores: Tensor, inputs: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Gradients of each text's scores, for as many texts at once as memory is meant for.

    Args:
        scores: [B, T]; those of an image depend on no other image.
        inputs: tensors [B, ...] that all scores depend on.

    Yields:
        For the next t texts, with respect to each of the inputs, [t, B, ...].
    """
    count = scores.shape[1]
    each = torch.eye(count, dtype=scores.dtype, device=scores.device)[:, None]
    at_once = max(1, _NUMBERS_AT_ONCE // sum(x.numel() for x in inputs))
    for first in range(0, count, at_once):
        chosen = each[first : first + at_once].expand(-1, *scores.shape)
        more = first + at_once < count
        yield list(torch.autograd.grad(scores, inputs, chosen, more, is_grads_batched=True))


def first_block(backbone: Backbone, blocks: int | None) -> int:
    """Index of the first of so many last blocks; None: of all there are.

    Raises:
        InvalidSetting: less than one.
    """
    if blocks is not None and blocks < 1:
        raise InvalidSetting(f"blocks={blocks}: expected a number of last blocks, 1 or more")
    depth = backbone.tower.depth
    return 0 if blocks is None else max(depth - blocks, 0)


def on_grid(maps: Sequence[Tensor], backbone: Backbone, images: Tensor) -> Tensor:
    """Maps [t, B, N] of some texts each as those of all of them, [B, T, h, w]."""
    grid = backbone.tower.grid((images.shape[2], images.shape[3]))
    return torch.cat(list(maps)).transpose(0, 1).unflatten(2, grid)
