"""The samples that a run was made of, read again: its images, labels and captions."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from common.errors import UserError
from common.pictures import MAX_PIXELS
from datamodules._contents import describe_file, describe_group, has_changed
from datamodules._decode import Decoder, reason_of
from datamodules._remote import is_remote, without_query
from datamodules._samples import Sample
from datamodules._shards import expand_shards, name_shards
from datamodules._spool import SpoolFolder
from datamodules._tar import Entry, ShardError, index_shard
from tasks.run import Run
from tasks.run.place import in_store, read

Find = Callable[[str], Sample | None]
"""Key -> the sample, at its own size in ``original``; None where it can't be read."""


class Originals:
    """Reads what a run was made of, as far as it is there and still the same.

    Nothing is believed of a run's folder but names of local files: shards of other machines are only
    fetched where ``shards`` names them, no command is started, and no class of its config is imported.

    Args:
        run: a run.
        shards: where its input is now: a folder of shards, a pattern, URLs, or pictures, as
            ``--data.shards`` and ``--data.path`` take them. By default where it was.
    """

    def __init__(self, run: Run, shards: str | None = None) -> None:
        self.run = run
        self.failures: Counter[str] = Counter()
        """Why how many images, or shards, could not be read."""
        self.found = 0
        self._spool_folder: SpoolFolder | None = None
        self._groups: dict[str, list[Entry]] = {}
        self._places: dict[str, str] = {}
        data = run.settings["data"]
        self._decoder = Decoder(
            run.info,
            size=(1, 1),  # what the model saw is not needed
            max_pixels=int(data.get("max_pixels", MAX_PIXELS)),
            need_label=False,
            keep_original=True,
        )
        try:
            self._find(shards, own_pictures=data.get("name") == "images")
        except (UserError, OSError) as error:
            self.failures[str(error)] += 1

    def _find(self, shards: str | None, *, own_pictures: bool) -> None:
        """Fill in where each shard of the run is."""
        if own_pictures:
            self._find_pictures(shards)
        elif shards is not None:
            self._places = dict(name_shards(expand_shards(shards)))
        else:
            contents = self.run.described.get("contents", {})
            for name in self.run.shards:
                stored = contents.get(name, {}).get("path")
                place = stored and _existing(str(stored), self.run.folder)
                if place:
                    self._places[name] = str(place)
        missing = [name for name in self.run.shards if not self._known(name)]
        if missing:
            where = f": {', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}"
            self.failures[
                f"{len(missing)} of {len(self.run.shards)} input shards are not where they were{where}; "
                "say where they are with --shards"
            ] += 1

    def _find_pictures(self, path: str | None) -> None:
        """Groups of loose files, as `Images` makes them, and tars of pictures."""
        from datamodules.images import Images  # imports Lightning, which no other data needs

        said = _data_settings(self.run)
        specs = [path] if path is not None else said.get("path", [])
        specs = [specs] if isinstance(specs, str) else specs
        if path is None:
            local = [spec for spec in map(str, specs) if not is_remote(spec)]
            specs = [str(_existing(spec, self.run.folder) or spec) for spec in local]
        images = Images(path=specs, group=int(said.get("group", 200)))
        self._groups = images.found[0]
        self._places = dict(name_shards(images.found[1]))

    def _known(self, name: str) -> bool:
        return name in self._places or name in self._groups

    @contextmanager
    def open(self, shard: str) -> Iterator[Find]:
        """Read samples of a shard; all are None where it can't be read."""
        entries: dict[str, Entry] = {}
        try:
            with self._entries(shard) as found:
                entries = {entry.key: entry for entry in found}
                self._refuse_changed(shard, found)
                yield lambda key: self._sample(entries.get(key))
        except (ShardError, UserError, OSError) as error:
            self.failures[f"shard {shard}: {error}"] += 1
            yield lambda key: None

    @contextmanager
    def _entries(self, shard: str) -> Iterator[list[Entry]]:
        if shard in self._groups:
            yield self._groups[shard]
        elif shard in self._places:
            url = self._places[shard]
            if self._spool_folder is None:
                self._spool_folder = SpoolFolder()
            with self._spool_folder.fetched(url) as path:
                yield index_shard(path, without_query(url))
        else:
            yield []

    def _refuse_changed(self, shard: str, entries: list[Entry]) -> None:
        was = self.run.described.get("contents", {}).get(shard)
        if not was or not entries:
            return
        if shard in self._groups:
            spans = [(entry.key, span) for entry in entries for span in entry.members.values()]
            now = describe_group((key, Path(span.path)) for key, span in spans)
        elif is_remote(self._places[shard]):
            return
        else:
            now = describe_file(Path(self._places[shard]))
        if has_changed(was, now):
            raise ShardError("its pictures have changed since the run")

    def _sample(self, entry: Entry | None) -> Sample | None:
        if entry is None:
            return None
        try:
            sample = self._decoder(entry)
        except Exception as error:  # untrusted bytes may break any decoder in any way
            self.failures[f"image {entry.key}: {reason_of(error)}"] += 1
            return None
        self.found += 1
        return sample

    def close(self) -> None:
        """Remove fetched shards."""
        if self._spool_folder:
            self._spool_folder.cleanup()
            self._spool_folder = None


def _existing(stored: str, folder: Path) -> Path | None:
    """A path as the run knew it: as it stands, or below a folder that the run lies in."""
    if is_remote(stored) or stored.startswith("pipe:"):
        return None
    roots = [Path()] if in_store(folder) else [Path(), *folder.resolve().parents]
    return next((root / stored for root in roots if os.path.exists(root / stored)), None)


def _data_settings(run: Run) -> dict[str, Any]:
    """What ``config.yaml`` says of the data, which ``run.json`` only has in its results."""
    try:
        config = yaml.safe_load(read(run.folder / "config.yaml"))
        settings = config["data"]["init_args"]
    except (OSError, yaml.YAMLError, KeyError, TypeError):
        return {}
    return settings if isinstance(settings, dict) else {}
