"""Explanation methods: a backbone, images and texts to similarities on the token grid.

Each has a file with a function, and a row in `METHODS`.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from common.errors import InvalidSetting
from common.nearest import did_you_mean
from surgery.backbone import Backbone
from surgery.methods import (
    bi_modal,
    clip,
    grad_cam,
    grad_eclip,
    gscorecam,
    legrad,
    plrp,
    rclip,
    surgery,
)
from surgery.texts import Texts
from surgery.towers import OpenClipViT, ResNet, Tower, ViT

__all__ = ["METHODS", "Method", "check_method", "check_methods", "check_towers", "explain"]


@dataclass(frozen=True)
class Method:
    """One way to explain.

    Attributes:
        function: called with a backbone, normalised images [B, 3, H, W], `Texts`, and the method's
            own options by keyword; returns [B, T, h, w].
        summary: what it shows, in one line.
        cost: forward and backward passes, an image and a text.
        gradients: it needs them: it is called outside of inference mode, with gradients on and
            autocast off, on tensors of its own, on one image and one text or more, and on as many
            images as fit the memory. The network's weights are frozen; what a gradient is wanted of
            has to be asked for.
        towers: for which it is defined.
        class_token: it reads how the class token comes by what it knows, and is not defined for a tower
            that makes its image feature of patch tokens.
        cosines: its values are cosines or differences of such, so that float16 holds them; of others
            only float32 does, since their size is anything.
    """

    function: Callable[..., Tensor]
    summary: str
    cost: str = "1 forward an image"
    gradients: bool = False
    towers: tuple[type[Tower], ...] = (ViT, ResNet)
    class_token: bool = False
    cosines: bool = True

    def needs(self) -> str:
        """Of which towers, whether gradients, and what it costs: one line."""
        towers = " or ".join(tower.kind for tower in self.towers)
        return f"{towers}; {'gradients' if self.gradients else 'no gradients'}; {self.cost}"


METHODS: dict[str, Method] = {
    "surgery": Method(surgery.explain, "CLIP Surgery: the backbone's recipe, then feature surgery"),
    "surgery_paper": Method(
        surgery.explain_paper, "the same with feature surgery by the equations, not as released"
    ),
    "architecture": Method(
        surgery.explain_architecture, "the backbone's recipe alone, without feature surgery"
    ),
    "clip": Method(clip.explain, "plain CLIP: cosine of its patch tokens with the texts"),
    "rclip": Method(rclip.explain, "plain CLIP's map reversed"),
    "grad_cam": Method(
        grad_cam.explain,
        "Grad-CAM: the last layer's features, weighted by the mean gradient of the logit",
        "1 forward an image, 1 backward a text through the last block",
        gradients=True,
        cosines=False,
    ),
    "gscorecam": Method(
        gscorecam.explain,
        "gScoreCAM: the last features, weighted by the logit of the image masked with each",
        "1 forward an image and 1 a channel chosen (300 a text; at most all channels), 1 backward a "
        "text through the projection (of a ResNet, its attention pool)",
        gradients=True,
        cosines=False,
        class_token=True,
    ),
    "bi_modal": Method(
        bi_modal.explain,
        "Bi-Modal: attention times gradient of the logit, through the last block or several",
        "1 forward an image, 1 backward a text through these blocks",
        gradients=True,
        towers=(ViT,),
        cosines=False,
        class_token=True,
    ),
    "plrp": Method(
        plrp.explain,
        "partial LRP: relevance handed back from the score to the last block's attention",
        "1 forward an image; the last block's class token backwards a text",
        towers=(OpenClipViT,),
        cosines=False,
        class_token=True,
    ),
    "legrad": Method(
        legrad.explain,
        "LeGrad: gradient of scores, read after each of the last blocks, by its attention",
        "1 forward an image, 1 backward a text through each of these blocks by itself",
        gradients=True,
        towers=(ViT,),
        cosines=False,
        class_token=True,
    ),
    "grad_eclip": Method(
        grad_eclip.explain,
        "Grad-ECLIP: values along the gradient of the cosine, weighted by nearness of keys",
        "1 forward an image, 1 backward a text through the last block's feed-forward part",
        gradients=True,
        towers=(OpenClipViT,),
        cosines=False,
        class_token=True,
    ),
}

_CELLS_AT_ONCE = 4096
"""Of images that gradients are recorded of: 20 of ViT-B/16 at 224. Only GPUs say what is too much."""


def explain(
    backbone: Backbone,
    images: Tensor,
    text: Tensor | Texts,
    method: str = "surgery",
    **options: Any,
) -> Tensor:
    """How much each text is in each place of each image, by a method of `METHODS`.

    Args:
        backbone: whose explanation it is.
        images: [B, 3, H, W], normalised (`Backbone.preprocess`), on the backbone's device.
        text: features [T, C], or `Texts`, which know the empty text already.
        method: name in `METHODS`.
        options: the method's own.

    Returns:
        [B, T, h, w] on the token grid, signed, in float32, before any scaling to [0, 1].

    Raises:
        InvalidSetting: no such method, no such option of it, or it is not defined for the tower.

    Example:
        >>> from surgery import load_backbone
        >>> backbone = load_backbone("demo", "demo")
        >>> images = torch.zeros(2, 3, 96, 96)
        >>> text = backbone.encode_text(backbone.tokenizer(["star", "moon", "fish"]))
        >>> explain(backbone, images, text, method="clip").shape
        torch.Size([2, 3, 12, 12])
    """
    chosen = check_method(method, options)
    check_towers([method], backbone)
    texts = text if isinstance(text, Texts) else Texts(text)
    if not chosen.gradients:
        return chosen.function(backbone, images, texts, **options)
    grid = backbone.tower.grid((images.shape[2], images.shape[3]))
    if not len(images) or not len(texts):
        return texts.features.new_zeros(len(images), len(texts), *grid)
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(images.device.type, enabled=False),
    ):
        # Tensors made under inference mode can't be saved for a gradient; copies of them can.
        own = texts.clone()

        def part(images: Tensor) -> tuple[Tensor]:
            return (chosen.function(backbone, images, own, **options).detach(),)

        at_once = max(1, _CELLS_AT_ONCE // (grid[0] * grid[1]))
        parts = images.detach().clone().split(at_once)
        return torch.cat([backbone.graph_batches.run(part, some)[0] for some in parts])


def check_towers(names: Sequence[str], backbone: Backbone) -> None:
    """Refuse methods that are not defined for a backbone's image tower.

    Raises:
        InvalidSetting: says which, and what they are defined for.
    """
    for name in names:
        towers = METHODS[name].towers
        if not isinstance(backbone.tower, towers):
            kinds = " or ".join(kind.kind for kind in towers)
            raise InvalidSetting(
                f"method {name!r} is defined for a {kinds}, and the image tower of {backbone.name} is a "
                f"{backbone.tower.kind}"
            )
        if METHODS[name].class_token and not backbone.tower.has_class_token:
            raise InvalidSetting(
                f"method {name!r} reads what the class token attends to, and the image tower of "
                f"{backbone.name} {backbone.tower.pooled_by}"
            )


def check_methods(names: str | Sequence[str]) -> list[str]:
    """Names of methods, or of a single one, in their order.

    Raises:
        InvalidSetting: none, one of them twice, or one that there is not.
    """
    names = [names] if isinstance(names, str) else names
    if not names or len({*names}) < len(names):
        raise InvalidSetting(
            f"methods: expected different ones of {', '.join(METHODS)}, got {names}"
        )
    for name in names:
        check_method(name)
    return list(names)


def check_method(name: str, options: dict[str, Any] | None = None) -> Method:
    """The row of a method.

    Args:
        name: in `METHODS`.
        options: keywords it is to be called with.

    Returns:
        The row.

    Raises:
        InvalidSetting: no such method, or no such option of it.
    """
    if name not in METHODS:
        hint = did_you_mean(name, METHODS)
        raise InvalidSetting(f"no method {name!r} among {', '.join(METHODS)}{hint}")
    known = [
        parameter.name
        for parameter in inspect.signature(METHODS[name].function).parameters.values()
        if parameter.kind is parameter.KEYWORD_ONLY
    ]
    for option in options or ():
        if option not in known:
            has = f"it has {', '.join(known)}" if known else "it has none"
            raise InvalidSetting(f"method {name!r} has no option {option!r}: {has}")
    return METHODS[name]
