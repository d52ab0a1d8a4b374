"""Finding configs: files as they are given, or those in the package by name."""

from __future__ import annotations

import difflib
import os
from pathlib import Path

import configs

FOLDER = Path(configs.__file__).parent


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
    raise FileNotFoundError(
        f"no config {name!r}, neither as a file in {os.getcwd()} nor in the package. "
        f"Did you mean {', '.join(near or known[:8])}? `lightning list configs` lists all"
    )


def with_paths(argv: list[str]) -> list[str]:
    """``argv`` with what follows each ``--config`` replaced by the path that it stands for."""
    found = list(argv)
    for i, word in enumerate(argv):
        if word in ("--config", "-c") and i + 1 < len(argv):
            found[i + 1] = find_config(argv[i + 1])
        elif word.startswith("--config="):
            found[i] = f"--config={find_config(word.removeprefix('--config='))}"
    return found
