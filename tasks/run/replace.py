"""What lies in a folder before a run: other files are refused, an older run goes once the new begins."""

from __future__ import annotations

import shutil
from pathlib import Path

from tasks.run.errors import RunError
from tasks.run.place import MARKER, files_in, in_store, remove

_ASIDE = ".replaced"
"""Where an old run lies until the new one has been accepted."""

_GONE = ".deleted"
"""The same from then on, until it is deleted."""

_LOGS = ("lightning_logs", "wandb", "mlruns")
"""Where Lightning's loggers write, from before a run is opened: left alone."""


def refuse_other_files(folder: Path) -> None:
    """Refuse a folder that holds anything, but no run."""
    names = files_in(folder)
    if MARKER in names or _ASIDE in names:
        return
    for name in names:
        if not name.endswith(".partial") and not name.startswith((".job-", _GONE, *_LOGS)):
            raise RunError(
                f"{folder} is not empty and not a run of ours: choose another --writer.output"
            )


def set_aside(folder: Path) -> None:
    """Take an old run out of a folder; until all of it lies aside, `put_back` can undo it.

    What a store has can't be laid aside: there ``run.json`` stays to the last, so that one that was
    emptied by half is still the old run's.
    """
    if in_store(folder):
        for name, path in files_in(folder).items():
            if name != MARKER and not name.startswith(_LOGS):
                remove(path)
        return
    shutil.rmtree(folder / _GONE, ignore_errors=True)
    old = [path for path in folder.iterdir() if not path.name.startswith((".job-", _ASIDE, *_LOGS))]
    if old:
        (folder / _ASIDE).mkdir(exist_ok=True)
        for path in old:
            path.rename(folder / _ASIDE / path.name)
        (folder / _ASIDE).rename(folder / _GONE)


def put_back(folder: Path) -> None:
    """Undo a setting aside that was interrupted."""
    if (folder / _ASIDE).exists():
        for path in list((folder / _ASIDE).iterdir()):
            path.rename(folder / path.name)
        (folder / _ASIDE).rmdir()


def delete_set_aside(folder: Path) -> None:
    """Delete a run that was set aside."""
    if not in_store(folder):
        shutil.rmtree(folder / _GONE, ignore_errors=True)
