"""``run.json``, which makes a folder a run's: read back, and compared with what a job is a run of."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tasks.run.errors import RunError
from tasks.run.identity import differences
from tasks.run.place import MARKER, in_store, read, version_of

ANEW = "Choose another --writer.output, or start anew with --writer.overwrite true"


class TakenOver(RunError):
    """The run that a job works on is no more where it was."""


def read_marker(folder: Path) -> dict[str, Any] | None:
    """What ``run.json`` holds; None where there is none.

    Raises:
        RunError: it can't be read.
    """
    path = folder / MARKER
    try:
        described = read_json(path, ANEW)
    except (FileNotFoundError, NotADirectoryError):
        return None
    keys = ("identity", "shards", "info")
    if not isinstance(described, dict) or any(key not in described for key in keys):
        raise RunError(f"{path} does not describe a run: {ANEW}")
    return described


def read_json(path: Path, hint: str) -> Any:
    """What a file of a run's folder holds.

    Args:
        path: of the file.
        hint: what to do where it can't be read.

    Raises:
        FileNotFoundError: there is none.
        RunError: it can't be read.
    """
    try:
        return json.loads(read(path))
    except (FileNotFoundError, NotADirectoryError):
        raise
    except (OSError, ValueError) as error:
        raise RunError(f"{path} can't be read ({error}): {hint}") from None


def refuse_another(folder: Path, before: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Refuse to go on with a run of other settings.

    Raises:
        RunError: they differ; says how.
    """
    if changes := _listed(before, settings):
        raise RunError(f"{folder} holds another run's results:\n{changes}\n{ANEW}")


class Ownership:
    """Whether a run in a store is still the one that this job works on: a store has no locks.

    A job looks before it writes anything, and after each shard that it sends, which it takes back unless
    the look says that all is well. What is left is a window: one look comes before, and one after, what
    is written in between. A job that is killed, or loses the store, after its put and before it has
    taken that back leaves its shard in a run that was begun meanwhile. And as a put replaces what has
    its name, that run may lose a shard of its own, which its job finds at its end (see
    `Tally.take_away`). Input shards are not looked at: runs of the same settings are one.

    A look takes one small request, unless somebody has written ``run.json``.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._known = ""

    def check(self, settings: Mapping[str, Any]) -> None:
        """Do nothing where all is well.

        Args:
            settings: what the job is a run of.

        Raises:
            TakenOver: it is another run now.
        """
        if not in_store(self.folder):
            return  # which is locked
        try:
            version = version_of(self.folder / MARKER)
        except FileNotFoundError:
            version = None
        if version and version == self._known:
            return
        now = read_marker(self.folder) if version else None
        if now is None:
            raise TakenOver(f"{self.folder / MARKER} was deleted while this run was at work")
        if changes := _listed(now, settings):
            raise TakenOver(
                f"another run was begun in {self.folder} while this one was at work, which ends here:\n"
                f"{changes}\nChoose another --writer.output"
            )
        self._known = version or ""


def _listed(before: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    return "\n".join(f"  {line}" for line in differences(before["identity"], settings))
