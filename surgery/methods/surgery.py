"""CLIP Surgery (Li et al., arXiv 2304.05653): architecture surgery, then feature surgery."""

from typing import Literal

from torch import Tensor

from surgery.backbone import Backbone
from surgery.features import feature_surgery, similarity
from surgery.methods._images import image_by_image
from surgery.texts import Texts


def explain(
    backbone: Backbone,
    images: Tensor,
    texts: Texts,
    *,
    form: Literal["code", "paper", "none"] = "code",
    tau: float = 2.0,
    alone: bool = False,
) -> Tensor:
    """Tokens by the backbone's recipe, and their similarity without what all texts share.

    Args:
        backbone: reformed by its recipe ("surgery" unless it was loaded with another).
        images: [B, 3, H, W], normalised.
        texts: T of them; a single one is compared with the empty text.
        form: of `feature_surgery`; "none" leaves it out.
        tau: of `feature_surgery`.
        alone: each text is compared with the empty one, and not with the others.

    Returns:
        [B, T, h, w], signed.
    """
    redundant = texts.redundant(backbone, alone=alone)

    def score(patches: Tensor, token: Tensor) -> Tensor:
        text = texts.features
        if form == "none":
            return similarity(patches, text)
        return feature_surgery(patches, token, text, redundant=redundant, tau=tau, form=form)

    return image_by_image(backbone.encode_image(images, texts.features), score)


def explain_paper(
    backbone: Backbone, images: Tensor, texts: Texts, *, tau: float = 2.0, alone: bool = False
) -> Tensor:
    """`explain` with feature surgery by the paper's equations, to be measured beside the code's."""
    return explain(backbone, images, texts, form="paper", tau=tau, alone=alone)


def explain_architecture(backbone: Backbone, images: Tensor, texts: Texts) -> Tensor:
    """`explain` without feature surgery ("Archi." of the paper's Table 3), in [-1, 1]."""
    return explain(backbone, images, texts, form="none")
