"""Finding what the words of a command line and of configs stand for: files, tasks, data sets."""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path
from typing import Any

import configs
from common.errors import MissingFile, UserError
from datamodules import DATASETS
from tasks import TASKS

FOLDER = Path(configs.__file__).parent
CLASSES = {
    "model": {cls: f"tasks.{cls}" for cls in TASKS.values()},
    "data": {cls: f"datamodules.{cls}" for cls in DATASETS.values()},
}
"""Field -> class name -> class path."""
_CLASS_OPTION = re.compile(r"--(model|data)(?:\.class_path|\.help)?")


class UnknownName(UserError, LookupError):
    """No task or data set has that name; jsonargparse lets it through, unlike a ValueError."""


def packaged() -> list[Path]:
    """The packaged configs, by name; parts that others are composed of are in sub-folders."""
    return sorted(FOLDER.glob("*.yaml"))


def find_config(name: str) -> str:
    """Path of a config: a file as given, or a packaged one by its name, with or without .yaml.

    Raises:
        FileNotFoundError: neither; lists the nearest names.
    """
    if os.path.isfile(name):
        return name
    known = [path.name for path in packaged()]
    for candidate in (name, f"{name}.yaml"):
        if candidate in known:
            return str(FOLDER / candidate)
    near = difflib.get_close_matches(Path(name).name, known, n=4, cutoff=0.4)
    raise MissingFile(
        f"no config {name!r}, neither as a file in {os.getcwd()} nor in the package. "
        f"Did you mean {', '.join(near or known[:8])}? `lightning list configs` lists all"
    )


def find_class(field: str, name: str) -> str:
    """Class path of a task (``field`` is "model") or DataModule ("data") that is known by its name.

    With its path, only that class is imported; a bare name is looked up among all that were imported.
    Anything that is not a bare name (a class path, a file) is returned as it is.

    Raises:
        UnknownName: no such class; lists the nearest names and all others.
    """
    known = CLASSES[field]
    if name in known or not name.isidentifier() or os.path.exists(name):
        return known.get(name, name)
    what = {"model": "task", "data": "data set"}[field]
    spelled = {cls.lower(): cls for cls in known}
    near = [spelled[n] for n in difflib.get_close_matches(name.lower(), spelled, n=2)]
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    raise UnknownName(f"--{field}: no {what} {name!r}.{hint} Known: {', '.join(sorted(known))}")


def with_paths(argv: list[str]) -> list[str]:
    """``argv`` with the paths that configs, tasks and data sets stand for in place of their names."""
    found = list(argv)
    for i, word in enumerate(argv):
        option, equals, value = word.partition("=")
        at = i if equals else i + 1
        if not equals:
            value = argv[at] if at < len(argv) and not argv[at].startswith("-") else ""
        if not value:
            continue
        if option in ("--config", "-c"):
            value = find_config(value)
        elif match := _CLASS_OPTION.fullmatch(option):
            value = find_class(match[1], value)
        else:
            continue
        found[at] = f"{option}={value}" if equals else value
    return found


def with_class_paths(config: Any) -> Any:
    """A config as it was read, with the class paths of tasks and data sets in place of their names."""
    if isinstance(config, list):
        return [with_class_paths(value) for value in config]
    if not isinstance(config, dict):
        return config
    found = {key: with_class_paths(value) for key, value in config.items()}
    for field, classes in CLASSES.items():
        value = found.get(field)
        if isinstance(value, str):
            found[field] = classes.get(value, value)  # a backbone's `model: demo` is no task
        elif isinstance(value, dict) and isinstance(value.get("class_path"), str):
            value["class_path"] = find_class(field, value["class_path"])
    if isinstance(name := found.get("class_path"), str):  # in a file of its own, for either field
        found["class_path"] = {**CLASSES["model"], **CLASSES["data"]}.get(name, name)
    return found
