"""What open_clip knows of the published weights of a model, for weights that come without saying so."""

import logging
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)


def agreed(model: str, keys: tuple[str, ...]) -> dict[str, Any]:
    """Settings that all published weights of a model have in common, such as the mean of their images.

    Args:
        model: an open_clip name, or anything else, of which nothing is known.
        keys: of open_clip's configs of pretrained weights.
    """
    tags = _tags(model)
    found = {}
    for key in keys:
        values = [tag.get(key) for tag in tags.values()]
        if values and values[0] is not None and all(value == values[0] for value in values):
            found[key] = values[0]
    return found


def doubt_activation(model: str, path: str) -> None:
    """Warn where weights of a file, which are read with GELU, were likely trained with quick GELU.

    A state dict doesn't say, and with the wrong one every layer is a little off: CLIP still answers, but
    worse. What is known: the tag that the file is named after, or what all published weights of the
    model have in common (of ViT-L-14-336 and of RN50x4, there are OpenAI's only).

    Args:
        model: an open_clip name, or anything else, of which nothing is known.
        path: of the weights.
    """
    tags = {name: bool(tag.get("quick_gelu")) for name, tag in _tags(model).items()}
    file = Path(path).name.lower()
    likely = {name: quick for name, quick in tags.items() if name.lower() in file} or tags
    if likely and all(likely.values()):
        log.warning(
            "%s: it does not say with which activation it was trained. %s is read with GELU, and its "
            "published weights (%s) were trained with quick GELU: if this is one of them, or tuned from "
            "one, set quick_gelu=True (--model.backbone.quick_gelu true); if not, False.",
            path,
            model,
            ", ".join(likely),
        )


def _tags(model: str) -> dict[str, dict[str, Any]]:
    import open_clip

    names = open_clip.list_pretrained_tags_by_model(model)
    return {name: open_clip.get_pretrained_cfg(model, name) for name in names}
