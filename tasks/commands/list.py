"""``lightning list``: what there is to choose from."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

import datamodules
from datamodules import DATASETS
from tasks import TASKS
from tasks._configs import FOLDER, all_names, names_of, title
from tasks.commands._parser import Parser


def arguments() -> Parser:
    """Of ``lightning list``."""
    parser = Parser(prog="lightning list", description="What there is to choose from.")
    parser.add_argument("what", choices=sorted(LISTS), help="what to list")
    return parser


def main(argv: list[str]) -> int:
    """Run ``lightning list``; returns the exit code."""
    for name, text in LISTS[arguments().parse_args(argv).what]():
        print(f"{name:<36} {text}" if text else name)
    return 0


def list_configs() -> list[tuple[str, str]]:
    """Packaged configs with what each reproduces, and the parts that they are composed of."""
    parts = [
        (f"{kind}/{name}.yaml", title(FOLDER / kind / f"{name}.yaml"))
        for kind in ("backbones", "experiments")
        for name in names_of(kind)
    ]
    return [*parts, *((f"{name}.yaml", text) for name, text in all_names().items())]


def list_datasets() -> list[tuple[str, str]]:
    """DataModules, their names under ``lightning shards``, and their classes."""
    rows = []
    for name, cls in sorted(DATASETS.items()):
        info = getattr(datamodules, cls).info
        classes = f"{len(info.classes)} classes: {', '.join(info.classes)}" if info.classes else ""
        rows.append((f"{cls} ({name})", classes))
    return rows


def list_tasks() -> list[tuple[str, str]]:
    """Tasks, and what each needs of a data set."""
    rows = []
    for module, cls in sorted(TASKS.items()):
        task = getattr(import_module(f"tasks.{module}"), cls)
        first = (task.__doc__ or "").splitlines()[0]
        rows.append((cls, f"{first} Needs: {', '.join(task.needs) or 'images'}."))
    return rows


def list_models() -> list[tuple[str, str]]:
    """open_clip's models with their pretrained tags, or why they can't be explained; and ours."""
    import open_clip

    from surgery.architectures import why_not

    rows = [
        ("demo", "the tiny CLIP inside this package"),
        ("hf:NAME, or its folder", "a CLIPModel or SiglipModel of the Hugging Face hub"),
    ]
    for name in open_clip.list_models():
        reason = why_not(open_clip.get_model_config(name))
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name))
        rows.append((name, f"refused: {reason}" if reason else tags))
    return rows


def list_recipes() -> list[tuple[str, str]]:
    """Values of ``--model.backbone.attention``, and what each needs."""
    from surgery import RECIPES

    return [(name, f"{recipe.summary} ({recipe.needs()})") for name, recipe in RECIPES.items()]


def list_methods() -> list[tuple[str, str]]:
    """Values of ``--model.methods``, and what each needs and costs."""
    from surgery import METHODS

    return [(name, f"{method.summary} ({method.needs()})") for name, method in METHODS.items()]


def list_protocols() -> list[tuple[str, str]]:
    """Values of ``--model.protocol``, and the data sets that each is of."""
    from tasks import _protocols

    return _protocols.list_protocols()


LISTS: dict[str, Callable[[], list[tuple[str, str]]]] = {
    "configs": list_configs,
    "datasets": list_datasets,
    "methods": list_methods,
    "models": list_models,
    "protocols": list_protocols,
    "recipes": list_recipes,
    "tasks": list_tasks,
}
