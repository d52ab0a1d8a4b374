"""Explanation methods: a backbone, images and texts to similarities on the token grid.

Each has a file with a function, and a row in `METHODS`.
"""

import difflib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from common.errors import InvalidSetting
from surgery.backbone import Backbone
from surgery.methods import clip, rclip, surgery
from surgery.texts import Texts

__all__ = ["METHODS", "Method", "check_method", "check_methods", "explain"]


@dataclass(frozen=True)
class Method:
    """One way to explain.

    Attributes:
        function: called with a backbone, normalised images [B, 3, H, W], `Texts`, and the method's
            own options by keyword; returns [B, T, h, w].
        summary: what it shows, in one line.
        gradients: it needs them: it is called outside of inference mode, with gradients on and
            autocast off, on tensors of its own, and on as many images as fit the memory. The
            network's weights are frozen; what a gradient is wanted of has to be asked for.
    """

    function: Callable[..., Tensor]
    summary: str
    gradients: bool = False


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
}


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
        InvalidSetting: no such method, or no such option of it.

    Example:
        >>> from surgery import load_backbone
        >>> backbone = load_backbone("demo", "demo")
        >>> images = torch.zeros(2, 3, 96, 96)
        >>> text = backbone.encode_text(backbone.tokenizer(["star", "moon", "fish"]))
        >>> explain(backbone, images, text, method="clip").shape
        torch.Size([2, 3, 12, 12])
    """
    chosen = check_method(method, options)
    texts = text if isinstance(text, Texts) else Texts(text)
    if not chosen.gradients:
        return chosen.function(backbone, images, texts, **options)
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(images.device.type, enabled=False),
    ):
        # Tensors made under inference mode can't be saved for a gradient; copies of them can.
        own = texts.clone()

        def part(images: Tensor) -> tuple[Tensor]:
            return (chosen.function(backbone, images.clone(), own, **options).detach(),)

        return backbone.batches.run(part, images.detach().clone())[0]


def check_methods(names: Sequence[str]) -> list[str]:
    """Names of methods, in their order.

    Raises:
        InvalidSetting: none, one of them twice, or one that there is not.
    """
    if isinstance(names, str) or not names or len({*names}) < len(names):
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
        near = difflib.get_close_matches(name, METHODS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
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
