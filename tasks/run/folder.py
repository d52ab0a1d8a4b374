"""A run's folder, opened to be written, or read back."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.files import write_atomically
from datamodules._contents import has_changed
from datamodules._samples import DatasetInfo, SampleError
from tasks.run.errors import RunError
from tasks.run.lock import FolderLock, Job
from tasks.run.reading import read_images
from tasks.run.results import StoredImage
from tasks.run.shard import OutputShard, ShardRecord, find_shard, leftover_of
from tasks.run.summary import Published, merge_shards, write_summary

if TYPE_CHECKING:  # torchmetrics takes seconds to import, and only merging needs it
    from tasks.measures import Measures, Report

log = logging.getLogger(__name__)

MARKER = "run.json"
"""What makes a folder a run's: what it is a run of."""

JOBS = "jobs.jsonl"
"""How long each job took that worked on the run; no part of its results."""

_ASIDE = ".replaced"
"""Where an old run lies until the new one has been accepted."""

_GONE = ".deleted"
"""The same from then on, until it is deleted."""

_LOGS = ("lightning_logs", "wandb", "mlruns")
"""Where Lightning's loggers write, from before a run is opened: left alone."""

_ANEW = "Choose another --writer.output, or start anew with --writer.overwrite true"


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
        self.finished: list[str] = []
        self._overwrite = False
        self._lock: FolderLock | None = None

    @classmethod
    def load(cls, folder: str | Path) -> Run:
        """Read back a run.

        Args:
            folder: where ``lightning predict`` wrote it, finished or not.

        Raises:
            RunError: it holds no run, or its ``run.json`` can't be read.
        """
        return cls(Path(folder), _read_marker(Path(folder)))

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
        summary = _read_json(path, f"`lightning metrics {self.folder}` makes it anew")
        if not isinstance(summary, dict) or "metrics" not in summary:
            raise RunError(f"{path} is no summary: `lightning metrics {self.folder}` makes it anew")
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
            return [SampleError(**json.loads(line)) for line in path.read_text().splitlines()]
        except (OSError, ValueError, TypeError) as error:
            raise RunError(f"{path} can't be read ({error}): {again}") from None

    @property
    def jobs(self) -> list[dict[str, Any]]:
        """The jobs that made the run: ``began`` (UTC), ``seconds``, ``images`` and ``processes`` of each.

        ``peak_memory_mib`` is that of the first process, of the GPU where it has one. Jobs that were
        killed are not among them.
        """
        try:
            lines = (self.folder / JOBS).read_text().splitlines()
            return [json.loads(line) for line in lines]
        except FileNotFoundError:
            return []
        except (OSError, ValueError) as error:
            raise RunError(f"{self.folder / JOBS} can't be read ({error}): delete it") from None

    def note_job(self, job: Mapping[str, Any]) -> None:
        """Add a job that has come to its end to those of the run."""
        with open(self.folder / JOBS, "a") as file:
            file.write(f"{json.dumps(job)}\n")

    def images(self, shards: Collection[str] | None = None) -> Iterator[StoredImage]:
        """Every image's results, in shard order, of all shards that are finished.

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
        for name in self.shards:
            wanted = shards is None or name in shards
            if wanted and (path := find_shard(self.folder, name)):
                yield from read_images(path, info)

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
            The run, with ``finished`` filled in: those of ``mine``. `close` leaves the folder to others.

        Raises:
            RunError: the folder holds other things, is in use, or another run's.
        """
        run = cls(folder, described)
        run._overwrite = overwrite
        if file := next(
            (f for f in (folder, *folder.parents) if f.exists() and not f.is_dir()), None
        ):
            raise RunError(f"{file} is a file, no folder: choose another --writer.output")
        if folder.exists() and not (folder / MARKER).exists() and not (folder / _ASIDE).exists():
            _refuse_other_files(folder)
        made = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        try:
            run._lock = FolderLock(folder, Job.this(part, parts), alone=overwrite)
            _put_back(folder)
            if not overwrite:
                run._refuse_changes(of_shards=True)
                run.finished = run._find_finished(mine)
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
            RunError: the folder holds another run's results.
        """
        more = json.loads(json.dumps(more))
        self.described = {
            **self.described,
            **more,
            "identity": {**self.described["identity"], **more.get("identity", {})},
        }
        if self._overwrite:
            _set_aside(self.folder)
        else:
            self._refuse_changes()
        alone = self._lock is not None and not self._lock.others()
        ours, all_shards = set(mine), set(self.shards)
        for path in list(self.folder.iterdir()):
            if path.name.startswith(".job-"):
                continue
            shard = leftover_of(path.name)
            if shard in ours or (shard and alone and shard not in all_shards):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        write_atomically(self.folder / MARKER, json.dumps(self.described, indent=1))
        if config:
            write_atomically(self.folder / "config.yaml", config)
        shutil.rmtree(self.folder / _GONE, ignore_errors=True)

    def close(self) -> None:
        """Leave the folder to others."""
        if self._lock:
            self._lock.release()
            self._lock = None

    def shard(self, name: str) -> OutputShard:
        """Begin an output shard; it appears in the folder when it is published."""
        return OutputShard(self.folder, name, self.settings["writer"]["layout"], self.info)

    def missing(self) -> list[str]:
        """Shards that are not in the folder."""
        return [name for name in self.shards if not find_shard(self.folder, name)]

    def summarise(
        self, measures: Measures | None = None, elsewhere: Mapping[str, Published] | None = None
    ) -> tuple[Report, dict[str, ShardRecord | SampleError]]:
        """Merge what all finished shards measured, in shard order, and write the summary files.

        Args:
            measures: empty ones of the run's task; by default made from its settings.
            elsewhere: what other machines hold, of shards that are not in the folder.

        Returns:
            The report, and what each shard says of itself, or why it is missing.
        """
        report, outcomes = self.measured(measures, elsewhere)
        write_summary(self.folder, report, outcomes, len(self.shards))
        return report, outcomes

    def measured(
        self, measures: Measures | None = None, elsewhere: Mapping[str, Published] | None = None
    ) -> tuple[Report, dict[str, ShardRecord | SampleError]]:
        """The same, and nothing is written."""
        measures = measures or self.measures()
        outcomes = merge_shards(self.folder, self.shards, measures, elsewhere or {})
        return measures.report(), outcomes

    def _find_finished(self, mine: Collection[str]) -> list[str]:
        """Shards of ours with results; those that are broken are done again."""
        finished = []
        for name in mine:
            path = find_shard(self.folder, name)
            if path is None:
                continue
            try:
                ShardRecord.load(path)
            except RunError as error:
                log.warning("%s; this shard is done again", str(error).rsplit(":", 1)[0])
            else:
                finished.append(name)
        return finished

    def _refuse_changes(self, *, of_shards: bool = False) -> None:
        """Refuse to go on with a run whose settings, or finished input shards, are others."""
        if not (self.folder / MARKER).exists():
            return
        before = _read_marker(self.folder)
        old, new = flatten(before["identity"]), flatten(self.settings)
        changes = [
            _difference(key, old.get(key), new[key]) for key in new if old.get(key) != new[key]
        ]
        if changes:
            lines = "\n".join(f"  {line}" for line in changes)
            raise RunError(f"{self.folder} holds another run's results:\n{lines}\n{_ANEW}")
        if not of_shards:
            return
        contents = before.get("contents", {})
        for name, now in self.described["contents"].items():
            was, path = contents.get(name), find_shard(self.folder, name)
            if was and path and has_changed(was, now):
                raise RunError(
                    f"the pictures of shard {name} have changed since {path} was made of them. Delete "
                    f"that file to have them done again. {_ANEW}"
                )


def _read_marker(folder: Path) -> dict[str, Any]:
    """What ``run.json`` holds."""
    path = folder / MARKER
    if not path.exists():
        raise RunError(f"{folder} is not a run's folder: it has no {MARKER}")
    described = _read_json(path, _ANEW)
    keys = ("identity", "shards", "info")
    if not isinstance(described, dict) or any(key not in described for key in keys):
        raise RunError(f"{path} does not describe a run: {_ANEW}")
    return described


def _read_json(path: Path, hint: str) -> Any:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise RunError(f"{path} is missing: {hint}") from None
    except (OSError, ValueError) as error:
        raise RunError(f"{path} can't be read ({error}): {hint}") from None


def _refuse_other_files(folder: Path) -> None:
    ours = (".job-", _GONE, *_LOGS)
    for path in folder.iterdir():
        if not path.name.endswith(".partial") and not path.name.startswith(ours):
            raise RunError(
                f"{folder} is not empty and not a run of ours: choose another --writer.output"
            )


def _set_aside(folder: Path) -> None:
    """Take an old run out of a folder; until all of it lies aside, `_put_back` can undo it."""
    shutil.rmtree(folder / _GONE, ignore_errors=True)
    old = [path for path in folder.iterdir() if not path.name.startswith((".job-", _ASIDE, *_LOGS))]
    if old:
        (folder / _ASIDE).mkdir(exist_ok=True)
        for path in old:
            path.rename(folder / _ASIDE / path.name)
        (folder / _ASIDE).rename(folder / _GONE)


def _put_back(folder: Path) -> None:
    """Undo a setting aside that was interrupted."""
    if (folder / _ASIDE).exists():
        for path in list((folder / _ASIDE).iterdir()):
            path.rename(folder / path.name)
        (folder / _ASIDE).rmdir()


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


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


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
