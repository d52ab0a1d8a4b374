"""A run's folder, opened to be written, or read back."""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datamodules._contents import has_changed
from datamodules._samples import DatasetInfo, SampleError
from datamodules._spool import SpoolFolder
from tasks.run.errors import RunError
from tasks.run.image import StoredImage
from tasks.run.lock import FolderLock, Job
from tasks.run.marker import ANEW, Ownership, read_json, read_marker, refuse_another
from tasks.run.place import MARKER, append, files_in, in_store, place_of, read, remove, write
from tasks.run.reading import read_images
from tasks.run.replace import delete_set_aside, put_back, refuse_other_files, set_aside
from tasks.run.shard import OutputShard, ShardRecord, find_shards, leftover_of
from tasks.run.summary import Published, merge_shards, note_loss, write_summary

if TYPE_CHECKING:  # torchmetrics takes seconds to import, and only merging needs it
    from tasks.measures import Measures, Report

log = logging.getLogger(__name__)

JOBS = "jobs.jsonl"
"""How long each job took that worked on the run; no part of its results."""


class Run:
    """A run's folder: what it is a run of, what is finished, and its results.

    ``load`` reads a run back. A run that is worked on is ``open``-ed, which changes nothing that an
    earlier run left, then ``accept``-ed once all is known to be valid; its shards are published one by
    one, and at the end it is ``summarise``-d. Neither needs Lightning, nor a model's weights.

    Args:
        folder: of the run.
        described: what ``run.json`` holds: ``identity`` (every setting that can change a result),
            ``shards`` (their names in order), ``contents`` (what tells a changed input shard apart),
            ``info`` (of the data set), and what is only good to know.
    """

    def __init__(self, folder: Path, described: Mapping[str, Any]) -> None:
        self.folder = folder
        # As it will be read again: lists, not tuples.
        self.described: dict[str, Any] = json.loads(json.dumps(described))
        self.earlier: dict[str, Any] = {}
        self.finished: list[str] = []
        self.records: list[ShardRecord] = []
        self._overwrite = False
        self._lock: FolderLock | None = None
        self._work: SpoolFolder | None = None
        self._places: dict[str, Path] | None = None
        self._ownership = Ownership(folder)

    @classmethod
    def load(cls, folder: str | Path) -> Run:
        """Read back a run.

        Args:
            folder: where ``lightning predict`` wrote it, finished or not; also ``s3://bucket/run``.

        Raises:
            RunError: it holds no run, or its ``run.json`` can't be read.
        """
        place = place_of(folder)
        described = read_marker(place)
        if described is None:
            raise RunError(f"{place} is not a run's folder: it has no {MARKER}")
        return cls(place, described)

    @property
    def settings(self) -> dict[str, Any]:
        """Every setting that can change a result: of the task, the data and the writer."""
        identity: dict[str, Any] = self.described["identity"]
        return identity

    @property
    def info(self) -> DatasetInfo:
        """The data set.

        Raises:
            RunError: it is described in the words of another version of this package.
        """
        try:
            return DatasetInfo(**{k: _tuples(v) for k, v in self.described["info"].items()})
        except TypeError as error:
            raise RunError(
                f"{self.folder / MARKER} is of another version of this package ({error}): start anew"
            ) from None

    @property
    def shards(self) -> list[str]:
        """The names of all shards, in order, finished or not."""
        return list(self.described["shards"])

    @property
    def summary(self) -> dict[str, Any]:
        """What ``metrics.json`` holds."""
        path = self.folder / "metrics.json"
        again = f"`lightning metrics {self.folder}` makes it anew"
        try:
            summary = read_json(path, again)
        except FileNotFoundError:
            raise RunError(f"{path} is missing: {again}") from None
        if not isinstance(summary, dict) or "metrics" not in summary:
            raise RunError(f"{path} is no summary: {again}")
        return summary

    @property
    def metrics(self) -> dict[str, float | None]:
        """Name -> value over the whole run, a fraction; None where nothing could be measured."""
        return dict(self.summary["metrics"])

    @property
    def per_class(self) -> dict[str, dict[str, float | None]]:
        """Class name -> column -> value."""
        return dict(self.summary["per_class"])

    @property
    def errors(self) -> list[SampleError]:
        """The samples, and the whole shards, that could not be used."""
        path = self.folder / "errors.jsonl"
        again = f"`lightning metrics {self.folder}` makes it anew"
        try:
            return [SampleError(**json.loads(line)) for line in read(path).decode().splitlines()]
        except (OSError, ValueError, TypeError) as error:
            raise RunError(f"{path} can't be read ({error}): {again}") from None

    @property
    def jobs(self) -> list[dict[str, Any]]:
        """The jobs that made the run: ``began`` (UTC), ``seconds``, ``images`` and ``processes`` of each.

        ``peak_memory_mib`` is that of the first process, of the GPU where it has one. Jobs that were
        killed are not among them.
        """
        try:
            lines = read(self.folder / JOBS).decode().splitlines()
            return [json.loads(line) for line in lines]
        except FileNotFoundError:
            return []
        except (OSError, ValueError) as error:
            raise RunError(f"{self.folder / JOBS} can't be read ({error}): delete it") from None

    def note_job(self, job: Mapping[str, Any]) -> None:
        """Add a job that has come to its end to those of the run.

        Raises:
            RunError: the folder, of a store, has become another run's.
        """
        self._check_ownership()
        append(self.folder / JOBS, f"{json.dumps(job)}\n")

    def note_loss(self, error: SampleError) -> None:
        """Write down that a shard can't be read, until it is tried again; raises what `note_job` does."""
        self._check_ownership()
        note_loss(self.folder, error)

    def images(self, shards: Collection[str] | None = None) -> Iterator[StoredImage]:
        """Every image's results, in shard order, of all shards that are finished.

        Which these are is asked of a store once, the first time.

        Args:
            shards: only these.

        Raises:
            RunError: a shard is damaged.

        Example:
            >>> from tasks.run.results import Masks
            >>> for image in Run.load("runs/demo").images():  # doctest: +SKIP
            ...     masks = image.get(Masks)
        """
        info = self.info
        if self._places is None or not in_store(self.folder):
            self._places = self.places()
        for name, path in self._places.items():
            if shards is None or name in shards:
                yield from read_images(path, info)

    def places(self) -> dict[str, Path]:
        """Where the finished shards are now, in order."""
        return find_shards(files_in(self.folder), self.shards)

    def measures(self) -> Measures:
        """The empty measures of this run's task.

        Raises:
            RunError: they are none of the project's, or a setting that they need is missing.
        """
        from tasks.measures import measures_of

        settings = self.settings["task"]
        task, path = settings.get("class"), self.described.get("measures")
        try:
            return measures_of(task, self.info, settings, path)
        except KeyError as error:
            raise RunError(
                f"{self.folder / MARKER}: a run of the task {task!r}, of which this package doesn't know "
                f"{error}. If the task is your own, give the config that names it: `lightning metrics "
                f"{self.folder} --config CONFIG`"
            ) from None

    @classmethod
    def open(
        cls,
        folder: Path,
        described: Mapping[str, Any],
        *,
        mine: Collection[str],
        part: int = 0,
        parts: int = 1,
        overwrite: bool = False,
    ) -> Run:
        """Open a folder to write this run into, or to go on with it; nothing in it is changed yet.

        Args:
            folder: of the run; made where there is none.
            described: see the class; what is known before the weights are.
            mine: names of the shards that this job does.
            part: which part of the shards they are.
            parts: how many jobs share the folder, which know nothing of each other.
            overwrite: replace an earlier run, of whatever settings, once this one is accepted.

        Returns:
            The run, with ``finished`` filled in: those of ``mine``; ``records``, what these say of
            themselves, of which none is read in a store; and ``earlier``, what ``run.json`` held, if
            the run goes on. `close` leaves the folder to others.

        Raises:
            RunError: the folder holds other things, is in use, or another run's.
        """
        run = cls(folder, described)
        run._overwrite = overwrite
        if in_store(folder):
            refuse_other_files(folder)
            run._find_results(mine)
            return run
        if file := next(
            (f for f in (folder, *folder.parents) if f.exists() and not f.is_dir()), None
        ):
            raise RunError(f"{file} is a file, no folder: choose another --writer.output")
        refuse_other_files(folder)
        made = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        try:
            run._lock = FolderLock(folder, Job.this(part, parts), alone=overwrite)
            put_back(folder)
            run._find_results(mine)
        except BaseException:
            run.close()
            if made:
                with suppress(OSError):
                    folder.rmdir()
            raise
        return run

    def accept(self, mine: Collection[str], more: Mapping[str, Any], config: str = "") -> None:
        """Begin, now that all settings are known to be valid: only here an earlier run is deleted.

        Args:
            mine: names of the shards that this job does; what killed jobs left of them is removed.
            more: what else ``run.json`` should hold, also in its ``identity``.
            config: text of ``config.yaml``; none is written if empty.

        Raises:
            RunError: the folder holds another run's results; or, in a store, has become another run's
                since this one was begun here.
        """
        more = json.loads(json.dumps(more))
        self.described = {
            **self.described,
            **more,
            "identity": {**self.described["identity"], **more.get("identity", {})},
        }
        if self._overwrite:
            set_aside(self.folder)
        else:
            self._refuse_changes()
        write(self.folder / MARKER, json.dumps(self.described, indent=1))
        if self._overwrite and in_store(self.folder):
            self._check_ownership()
            set_aside(self.folder)  # what the old run's jobs sent before they could see this one
        alone = self._lock is not None and not self._lock.others()
        ours, all_shards = set(mine), set(self.shards)
        self._check_ownership()
        for name, path in files_in(self.folder).items():
            if name.startswith(".job-"):
                continue
            shard = leftover_of(name)
            if shard in ours or (shard and alone and shard not in all_shards):
                remove(path)
        if config:
            self._check_ownership()
            write(self.folder / "config.yaml", config)
        delete_set_aside(self.folder)

    def close(self) -> None:
        """Leave the folder to others."""
        if self._lock:
            self._lock.release()
            self._lock = None
        if self._work:
            self._work.cleanup()
            self._work = None

    def shard(self, name: str) -> OutputShard:
        """Begin an output shard; it appears in the folder when it is published.

        Publishing it raises `RunError` where the folder, of a store, has become another run's.
        """
        work, layout = None, self.settings["writer"]["layout"]
        if in_store(self.folder):
            self._work = self._work or SpoolFolder()
            work = self._work.path
        return OutputShard(self.folder, name, layout, self.info, work, self._check_ownership)

    def missing(self) -> list[str]:
        """Shards that are not in the folder."""
        there = self.places()
        return [name for name in self.shards if name not in there]

    def summarise(
        self, measures: Measures | None = None, elsewhere: Mapping[str, Published] | None = None
    ) -> tuple[Report, dict[str, ShardRecord | SampleError]]:
        """Merge what all finished shards measured, in shard order, and write the summary files.

        Args:
            measures: empty ones of the run's task; by default made from its settings.
            elsewhere: what other machines hold, of shards that are not in the folder.

        Returns:
            The report, and what each shard says of itself, or why it is missing.

        Raises:
            RunError: a shard is damaged, or the folder, of a store, has become another run's.
        """
        report, outcomes = self.measured(measures, elsewhere)
        self._check_ownership()
        write_summary(self.folder, report, outcomes, len(self.shards))
        return report, outcomes

    def measured(
        self, measures: Measures | None = None, elsewhere: Mapping[str, Published] | None = None
    ) -> tuple[Report, dict[str, ShardRecord | SampleError]]:
        """The same, and nothing is written."""
        measures = measures or self.measures()
        outcomes = merge_shards(self.folder, self.shards, measures, elsewhere or {})
        return measures.report(), outcomes

    def _check_ownership(self) -> None:
        self._ownership.check(self.settings)

    def _find_results(self, mine: Collection[str]) -> None:
        """Fill in ``finished``: shards of ours with results; those that are broken are done again."""
        if self._overwrite:
            return
        self._refuse_changes(of_shards=True)
        places = self.places()
        for name in mine:
            if name not in places:
                continue
            try:
                if not in_store(self.folder):  # which has them whole, or not at all
                    self.records.append(ShardRecord.load(places[name]))
            except RunError as error:
                log.warning("%s; this shard is done again", str(error).rsplit(":", 1)[0])
            else:
                self.finished.append(name)

    def _refuse_changes(self, *, of_shards: bool = False) -> None:
        """Refuse to go on with a run whose settings, or finished input shards, are others."""
        before = read_marker(self.folder)
        if before is None:
            return
        refuse_another(self.folder, before, self.settings)
        self.earlier = before
        if not of_shards:
            return
        contents, places = before.get("contents", {}), self.places()
        for name, now in self.described["contents"].items():
            was, path = contents.get(name), places.get(name)
            if was and path and has_changed(was, now):
                raise RunError(
                    f"the pictures of shard {name} have changed since {path} was made of them. Delete "
                    f"that file to have them done again. {ANEW}"
                )


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value
