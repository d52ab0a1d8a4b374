"""What a run is a run of, compared: every setting that can change a result."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What has changed from one identity to another, in words."""
    was, now = flatten(old), flatten(new)
    return [_difference(key, was.get(key), now[key]) for key in now if was.get(key) != now[key]]


def _difference(key: str, old: Any, new: Any) -> str:
    """What has changed of the identity, in words; where there is an option, by its name."""
    if key in _WORDS:
        return _WORDS[key]
    part, _, name = key.partition(".")
    option = f"--{_OPTIONS[part]}.{name}" if part in _OPTIONS else key
    return f"{option}: {old!r} there, {new!r} now"[:300]


_OPTIONS = {"task": "model", "data": "data", "writer": "writer"}
_WORDS = {
    "weights": "the weights are others",
    "sam": "the weights of SAM are others",
    "texts": "the features in the file of --model.text_features are others",
    "data.shards": "--data.shards are others",
    "data.prompts": "the words of the classes are others",
    "data.synonyms": "the words of the classes are others",
}


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """A nested dict as dotted key -> value.

    Example:
        >>> flatten({"task": {"tau": 2.0, "backbone": {"model": "RN50"}}, "precision": "32"})
        {'task.tau': 2.0, 'task.backbone.model': 'RN50', 'precision': '32'}
    """
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {
        k: v
        for key, value in tree.items()
        for k, v in flatten(value, f"{prefix}.{key}" if prefix else str(key)).items()
    }
