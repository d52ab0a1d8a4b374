"""CLIP Surgery as a library: the backbone, the method's formulas, prompts.

Knows torch and open_clip; nothing of Lightning, data sets or tasks. Names are loaded when they
are first used, so that importing the package costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from surgery.attention import RECIPES
    from surgery.backbone import Backbone, load_backbone
    from surgery.explainer import Explainer
    from surgery.explanation import Explanation
    from surgery.features import (
        feature_surgery,
        similarity,
        similarity_map,
        similarity_to_points,
    )
    from surgery.methods import METHODS, explain
    from surgery.prompts import TEMPLATES, encode_prompts
    from surgery.recipe import Recipe
    from surgery.texts import Texts
    from surgery.towers import ImageTokens

_HOMES = {
    "RECIPES": "attention",
    "Recipe": "recipe",
    "Backbone": "backbone",
    "load_backbone": "backbone",
    "Explainer": "explainer",
    "Explanation": "explanation",
    "feature_surgery": "features",
    "similarity": "features",
    "similarity_map": "features",
    "similarity_to_points": "features",
    "METHODS": "methods",
    "explain": "methods",
    "TEMPLATES": "prompts",
    "encode_prompts": "prompts",
    "Texts": "texts",
    "ImageTokens": "towers",
}

__all__ = [
    "METHODS",
    "RECIPES",
    "TEMPLATES",
    "Backbone",
    "Explainer",
    "Explanation",
    "ImageTokens",
    "Recipe",
    "Texts",
    "encode_prompts",
    "explain",
    "feature_surgery",
    "load_backbone",
    "similarity",
    "similarity_map",
    "similarity_to_points",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
