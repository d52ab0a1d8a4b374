"""Text features from a file, in place of prompts: learned prompts (CoOp, TaI-DPT, ...) plugged in."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor

from common.errors import InvalidSetting, MissingFile

TENSORS = ("text_features", "features")


def read_text_features(path: str, words: Sequence[str], aliases: Mapping[str, str]) -> Tensor:
    """Features of ``words`` from a safetensors file, of unit length: [T,C] float32.

    The file holds one matrix (or one called ``text_features`` or ``features``), a row a text. Its
    names are a JSON list: metadata ``names``, or a file of the same name that ends in ``.json``. With
    names, rows are found by them, whatever their order, and there may be more than needed; upper
    case, underscores and double spaces make no difference. Without, row i belongs to word i.

    Args:
        path: of the file.
        words: what features are wanted of.
        aliases: word -> its other name, such as the official class name.

    Raises:
        InvalidSetting: no such file, not of this format, or its shape or names don't fit.
    """
    if not words:
        raise InvalidSetting(
            "--model.text_features: the data set has no classes that they could stand for"
        )
    features, names = _read(Path(path))
    if not features.isfinite().all() or not features.norm(dim=1).all():
        raise InvalidSetting(f"{path}: a text feature is zero or not finite")
    if names is not None:
        if len(names) != len(features):
            raise InvalidSetting(f"{path} has {len(names)} names for {len(features)} text features")
        rows = {_plain(name): i for i, name in enumerate(names)}
        places = [rows.get(_plain(w), rows.get(_plain(aliases.get(w, w)))) for w in words]
        missing = [w for w, place in zip(words, places, strict=True) if place is None]
        if missing:
            raise InvalidSetting(
                f"{path} has no feature named {', '.join(map(repr, missing[:8]))} "
                f"({len(missing)} of {len(words)} missing); it has {', '.join(names[:8])}, ..."
            )
        features = features[[place for place in places if place is not None]]
    if len(features) != len(words):
        raise InvalidSetting(
            f"{path} has {len(features)} text features, expected {len(words)}, one each for "
            f"{', '.join(words[:4])}, ...; or give them names (metadata `names`, a JSON list)"
        )
    return F.normalize(features.float(), dim=-1)


def digest_of_texts(paths: Sequence[str]) -> str | None:
    """Digest of all that `read_text_features` reads of these files; None for no file.

    Raises:
        MissingFile: one isn't there.
    """
    digest = hashlib.sha256()
    for path in map(Path, paths):
        _need(path)
        digest.update(path.read_bytes())
        if _companion(path).exists():
            digest.update(_companion(path).read_bytes())
    return digest.hexdigest() if paths else None


def _need(path: Path) -> None:
    if not path.is_file():
        raise MissingFile(f"no file of text features at {str(path)!r}: a .safetensors is expected")


def _companion(path: Path) -> Path:
    return path.with_suffix(".json")


def _read(path: Path) -> tuple[Tensor, list[str] | None]:
    _need(path)
    try:
        with safe_open(path, "pt") as file:
            keys = list(file.keys())
            key = next((k for k in TENSORS if k in keys), keys[0] if len(keys) == 1 else None)
            if key is None:
                raise InvalidSetting(
                    f"{path} has tensors {keys[:8]}: call the one [T, C] {TENSORS[0]}"
                )
            features = file.get_tensor(key)
            listed = (file.metadata() or {}).get("names")
        if listed is None and _companion(path).exists():
            listed = _companion(path).read_text()
        names = None if listed is None else json.loads(listed)
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise InvalidSetting(f"--model.text_features {path}: {error}") from None
    if features.ndim != 2 or not features.is_floating_point():
        raise InvalidSetting(
            f"{path}: expected text features [T, C], given {features.dtype} {list(features.shape)}"
        )
    if names is not None and not (
        isinstance(names, list) and all(isinstance(name, str) for name in names)
    ):
        raise InvalidSetting(f"{path}: its names are not a JSON list of texts")
    return features, names


def _plain(name: str) -> str:
    return " ".join(name.casefold().replace("_", " ").split())
