"""Class names to text features: prompt templates, their ensemble, and a cache of it on disk."""

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from common.errors import InvalidSetting
from common.files import write_atomically
from surgery.backbone import Backbone
from surgery.sources import cache_folder

log = logging.getLogger(__name__)

Tokenizer = Callable[[list[str]], Tensor]

# OpenAI's 80 templates for ImageNet (the notebook of openai/CLIP), then five for scenes; together
# the 85 of the released code of CLIP Surgery.
TEMPLATES: tuple[str, ...] = (
    "a bad photo of a {}.",
    "a photo of many {}.",
    "a sculpture of a {}.",
    "a photo of the hard to see {}.",
    "a low resolution photo of the {}.",
    "a rendering of a {}.",
    "graffiti of a {}.",
    "a bad photo of the {}.",
    "a cropped photo of the {}.",
    "a tattoo of a {}.",
    "the embroidered {}.",
    "a photo of a hard to see {}.",
    "a bright photo of a {}.",
    "a photo of a clean {}.",
    "a photo of a dirty {}.",
    "a dark photo of the {}.",
    "a drawing of a {}.",
    "a photo of my {}.",
    "the plastic {}.",
    "a photo of the cool {}.",
    "a close-up photo of a {}.",
    "a black and white photo of the {}.",
    "a painting of the {}.",
    "a painting of a {}.",
    "a pixelated photo of the {}.",
    "a sculpture of the {}.",
    "a bright photo of the {}.",
    "a cropped photo of a {}.",
    "a plastic {}.",
    "a photo of the dirty {}.",
    "a jpeg corrupted photo of a {}.",
    "a blurry photo of the {}.",
    "a photo of the {}.",
    "a good photo of the {}.",
    "a rendering of the {}.",
    "a {} in a video game.",
    "a photo of one {}.",
    "a doodle of a {}.",
    "a close-up photo of the {}.",
    "a photo of a {}.",
    "the origami {}.",
    "the {} in a video game.",
    "a sketch of a {}.",
    "a doodle of the {}.",
    "a origami {}.",
    "a low resolution photo of a {}.",
    "the toy {}.",
    "a rendition of the {}.",
    "a photo of the clean {}.",
    "a photo of a large {}.",
    "a rendition of a {}.",
    "a photo of a nice {}.",
    "a photo of a weird {}.",
    "a blurry photo of a {}.",
    "a cartoon {}.",
    "art of a {}.",
    "a sketch of the {}.",
    "a embroidered {}.",
    "a pixelated photo of a {}.",
    "itap of the {}.",
    "a jpeg corrupted photo of the {}.",
    "a good photo of a {}.",
    "a plushie {}.",
    "a photo of the nice {}.",
    "a photo of the small {}.",
    "a photo of the weird {}.",
    "the cartoon {}.",
    "art of the {}.",
    "a drawing of the {}.",
    "a photo of the large {}.",
    "a black and white photo of a {}.",
    "the plushie {}.",
    "a dark photo of a {}.",
    "itap of a {}.",
    "graffiti of the {}.",
    "a toy {}.",
    "itap of my {}.",
    "a photo of a cool {}.",
    "a photo of a small {}.",
    "a tattoo of the {}.",
    "there is a {} in the scene.",
    "there is the {} in the scene.",
    "this is a {} in the scene.",
    "this is the {} in the scene.",
    "this is one {} in the scene.",
)

VILD: tuple[str, ...] = (
    "a photo of a {}.",
    "This is a photo of a {}",
    "There is a {} in the scene",
    "There is the {} in the scene",
    "a photo of a {} in the scene",
    "a photo of a small {}.",
    "a photo of a medium {}.",
    "a photo of a large {}.",
    "This is a photo of a small {}.",
    "This is a photo of a medium {}.",
    "This is a photo of a large {}.",
    "There is a small {} in the scene.",
    "There is a medium {} in the scene.",
    "There is a large {} in the scene.",
)
TEMPLATE_SETS: Mapping[str, tuple[str, ...]] = {
    "surgery": TEMPLATES,
    "openai": TEMPLATES[:80],
    "vild": VILD,
    "car": ("a clean origami {}.", *VILD),
}
"""Templates by name: CLIP Surgery's, OpenAI's for ImageNet, ViLD's (four have no full stop), and those of
CLIP as RNN (CaR), which CLIPer uses."""

_FORMAT = "1"  # part of every key: changes when the features would


def find_templates(templates: str | Sequence[str]) -> tuple[str, ...]:
    """The templates that a name, a single template or a list of them stands for.

    Raises:
        InvalidSetting: no such name, or a template without one {}.

    Example:
        >>> len(find_templates("openai")), find_templates("a photo of a {}.")
        (80, ('a photo of a {}.',))
    """
    if isinstance(templates, str):
        templates = TEMPLATE_SETS.get(templates, (templates,))
    if not templates or (odd := [one for one in templates if one.count("{}") != 1]):
        what = f"not {odd[0]!r}" if templates else "and there are none"
        raise InvalidSetting(
            f"templates are {', '.join(TEMPLATE_SETS)}, or texts with one {{}} each, {what}"
        )
    return tuple(templates)


def encode_prompts(
    backbone: Backbone,
    tokenizer: Tokenizer,
    names: Sequence[str],
    templates: Sequence[str] = TEMPLATES,
    *,
    batch_size: int = 256,
    cache_dir: str | Path | Literal[False] | None = None,
) -> Tensor:
    """Features of names in all prompt templates.

    Each name is put into every template (at its `{}`); the prompts' features are normalised,
    averaged, and normalised again.

    Args:
        backbone: that encodes them.
        tokenizer: its own.
        names: T of them.
        templates: texts with one `{}` each.
        batch_size: prompts encoded at a time; those of like length go together, since the text
            tower only computes as many positions as the longest of a batch needs.
        cache_dir: where features are kept between runs, by weights, templates and token ids; None:
            $CLIP_SURGERY_CACHE, or clip_surgery in the user's cache folder; False: nowhere. A
            folder that cannot be written, or a damaged file, only costs the time of computing.

    Returns:
        [T, C], of unit length, float32, on the backbone's device.

    Raises:
        ValueError: no names, or templates without a place for them.

    Example:
        >>> from surgery import load_backbone
        >>> backbone = load_backbone("demo", "demo")
        >>> encode_prompts(backbone, backbone.tokenizer, ["star", "moon"], cache_dir=False).shape
        torch.Size([2, 128])
    """
    if isinstance(names, str) or not names:
        raise ValueError(f"names: expected a list of one or more names, given {names!r}")
    if isinstance(templates, str) or not templates:
        raise ValueError(f"templates: expected one or more templates, given {templates!r}")
    if odd := [template for template in templates if template.count("{}") != 1]:
        raise ValueError(f"templates: expected one {{}} in each, given {odd[0]!r}")
    if batch_size < 1:
        raise ValueError(f"batch_size: expected 1 or more, given {batch_size}")
    device = backbone.device
    folder = _cache_folder(cache_dir)
    path = None
    if folder is not None:
        path = folder / f"{_key(backbone, tokenizer, names, templates)}.safetensors"
        cached = _read(path, (len(names), backbone.embed_dim))
        if cached is not None:
            return cached.to(device)
    prompts = [template.replace("{}", name) for name in names for template in templates]
    features = _encode(backbone, tokenizer(prompts), batch_size)
    features = F.normalize(features, dim=-1).view(len(names), len(templates), -1).mean(dim=1)
    features = F.normalize(features, dim=-1)
    if path is not None:
        _write(path, features.cpu())
    return features


@torch.no_grad()
def _encode(backbone: Backbone, token_ids: Tensor, batch_size: int) -> Tensor:
    """Features [P, C] of prompts [P, L], encoded from short to long, in the order given."""
    lengths = token_ids.argmax(dim=-1)
    device = backbone.device
    features = torch.empty(len(token_ids), backbone.embed_dim, dtype=torch.float32, device=device)
    # What is kept on disk must not depend on the precision of the run that came first.
    with torch.autocast(device.type, enabled=False):
        for chosen in lengths.argsort(stable=True).split(batch_size):
            encoded = backbone.encode_text(token_ids[chosen].to(device))
            features[chosen.to(device)] = encoded.float()
    return features


def _key(
    backbone: Backbone, tokenizer: Tokenizer, names: Sequence[str], templates: Sequence[str]
) -> str:
    """Hex key of what the features depend on.

    The tokenizer enters by its ids of the names and the templates: tokenizing all prompts would
    take longer than reading the features.
    """
    digest = hashlib.sha256()
    parts = (_FORMAT, backbone.fingerprint(), list(names), list(templates))
    digest.update(repr(parts).encode())
    digest.update(tokenizer([*names, *templates]).contiguous().numpy().tobytes())
    return digest.hexdigest()


def _cache_folder(cache_dir: str | Path | Literal[False] | None) -> Path | None:
    if cache_dir is False:
        return None
    if cache_dir is not None:
        return Path(cache_dir)
    return cache_folder()


def _read(path: Path, shape: tuple[int, int]) -> Tensor | None:
    """The features in a cache file; None where there are none, or not what they should be."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        features = load(path.read_bytes())["features"]
    except FileNotFoundError:
        return None
    except (OSError, SafetensorError, KeyError) as error:
        log.warning("prompt cache %s is not readable (%s); computing again", path, error)
        return None
    if features.shape != shape or features.dtype != torch.float32 or not features.isfinite().all():
        log.warning("prompt cache %s holds something else; computing again", path)
        return None
    return features


def _write(path: Path, features: Tensor) -> None:
    """Write a cache file at once: readers see all of it or nothing."""
    from safetensors.torch import save

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, save({"features": features.contiguous()}))
    except OSError as error:
        log.warning("prompt features are not cached in %s: %s", path.parent, error)
