"""Results out: one output shard an input shard, its metric state inside, published by one rename."""

from __future__ import annotations

import csv
import io
import json
import logging
import os
import shutil
import tarfile
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import Tensor
from torchmetrics import Metric
from webdataset import TarWriter

import tasks
from datamodules.samples import Batch, DatasetInfo, SampleError
from tasks import TASKS
from tasks._files import encode, write_atomically
from tasks.base import BackboneConfig, ImageResult, Report, Task

log = logging.getLogger(__name__)

STATE = "__shard__"
"""Folder inside an output shard for what is about the shard; webdataset passes over such names."""


class RunError(Exception):
    """The run can't go on; the message says why and what to do."""


class ShardRecord:
    """What one output shard says of itself: images, errors and metric states."""

    def __init__(self, images: int, errors: list[SampleError], states: dict[str, Tensor]) -> None:
        self.images = images
        self.errors = errors
        self.states = states

    def members(self) -> dict[str, dict[str, bytes]]:
        """The record as files: key -> ending -> bytes."""
        record = {"images": self.images, "errors": [list(e) for e in self.errors]}
        return {
            f"{STATE}/record": {"json": json.dumps(record, ensure_ascii=False).encode()},
            f"{STATE}/metrics": {"safetensors": safetensors.torch.save(self.states)},
        }

    @classmethod
    def load(cls, path: Path) -> ShardRecord:
        """Read the record of a published shard, a tar or a folder.

        Raises:
            RunError: it has none.
        """
        try:
            if path.is_dir():
                files = {name: (path / STATE / name).read_bytes() for name in _RECORD}
            else:
                with tarfile.open(path) as tar:
                    found = {m.name: m for m in tar if m.name.startswith(f"{STATE}/")}
                    files = {
                        name: tar.extractfile(found[f"{STATE}/{name}"]).read()  # type: ignore[union-attr]
                        for name in _RECORD
                    }
        except (OSError, KeyError, tarfile.TarError) as error:
            raise RunError(
                f"{path} is not a complete output shard ({error}): delete it and run again"
            ) from None
        record = json.loads(files["record.json"])
        return cls(
            record["images"],
            [SampleError(*e) for e in record["errors"]],
            safetensors.torch.load(files["metrics.safetensors"]),
        )


_RECORD = ("record.json", "metrics.safetensors")


class ResultWriter(BasePredictionWriter):
    """Writes a run's folder.

    One ``NAME.tar`` (or folder ``NAME/``) an input shard, which appears when the shard is finished,
    with its metric state inside; at the end ``metrics.json``, ``metrics.csv`` and ``errors.jsonl``. The
    folder remembers what it is a run of (``run.json``): the same run started again goes on with the
    shards that are missing, another one is refused.

    Args:
        output: folder of the run.
        layout: ``tar`` writes shards, ``files`` a folder of plain files in place of each.
        overlays: also write heat maps over the images (JPEG).
        overwrite: delete an earlier run in the folder first.
    """

    def __init__(
        self,
        output: str = "runs/latest",
        layout: Literal["tar", "files"] = "tar",
        overlays: bool = False,
        overwrite: bool = False,
    ) -> None:
        super().__init__("batch")
        self.output = Path(output)
        self.layout = layout
        self.overlays = overlays
        self.overwrite = overwrite
        self.config = ""
        self.report: Report | None = None
        self._before: dict[str, Any] = {}
        self._run: dict[str, Any] = {}
        self._shard: _OpenShard | None = None
        self._seen = 0
        self._bad = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Prepare the run's folder, and tell the datamodule which shards are finished."""
        task = _task(pl_module)
        finished: list[str] = []
        if trainer.is_global_zero:
            finished = self._prepare(task)
        finished = trainer.strategy.broadcast(finished, src=0)
        task.datamodule.finished = frozenset(finished)
        if finished and trainer.is_global_zero:
            log.info("%d shards are finished already in %s", len(finished), self.output)

    def _prepare(self, task: Task) -> list[str]:
        marker = self.output / "run.json"
        names = [name for name, _ in task.datamodule.shard_list()]
        if self.overwrite and marker.exists():
            shutil.rmtree(self.output)
        if not marker.exists() and self.output.exists() and any(self.output.iterdir()):
            raise RunError(
                f"{self.output} is not empty and not a run of ours: choose another --writer.output"
            )
        self._before = json.loads(marker.read_text())["identity"] if marker.exists() else {}
        self._run = self._describe(task, names)
        self._refuse_changes()
        self.output.mkdir(parents=True, exist_ok=True)
        for leftover in (*self.output.glob(".*.partial"), *self.output.glob("*.error.json")):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        published = {
            p.name.removesuffix(".tar") for p in self.output.iterdir() if self._is_shard(p)
        }
        return [name for name in names if name in published]

    def _describe(self, task: Task, names: list[str]) -> dict[str, Any]:
        """What ``run.json`` holds; a run with another identity may not share the folder."""
        packages = ("clip-surgery-lightning", "torch", "open_clip_torch", "lightning", "pillow")
        run = {
            "identity": {
                "task": {"class": type(task).__name__, **task.settings()},
                "data": task.datamodule.settings(),
                "writer": {"layout": self.layout, "overlays": self.overlays},
                "precision": str(task.trainer.precision),
            },
            "shards": names,
            "info": asdict(task.info),
            "versions": {name: version(name) for name in packages},
        }
        return json.loads(json.dumps(run))  # as it will be read again: lists, not tuples

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Now that the weights are known: check them too, and write down what this run is."""
        if not trainer.is_global_zero:
            return
        backbone = _task(pl_module).backbone
        self._run["identity"]["weights"] = backbone.fingerprint()
        self._run["checkpoint"] = asdict(backbone.checkpoint)
        self._refuse_changes()
        write_atomically(self.output / "run.json", json.dumps(self._run, indent=1))
        if self.config:
            write_atomically(self.output / "config.yaml", self.config)

    def _refuse_changes(self) -> None:
        old, new = flatten(self._before), flatten(self._run["identity"])
        changes = [
            f"  {key}: {old.get(key)!r} there, {new[key]!r} now"[:300]
            for key in new
            if self._before and old.get(key) != new[key]
        ]
        if changes:
            raise RunError(
                f"{self.output} holds another run's results:\n"
                + "\n".join(changes)
                + "\nChoose another --writer.output, or start anew with --writer.overwrite true"
            )

    def _is_shard(self, path: Path) -> bool:
        if path.name.startswith("."):
            return False
        return path.suffix == ".tar" if self.layout == "tar" else path.is_dir()

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Sequence[ImageResult],
        batch_indices: Sequence[int] | None,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Add a batch to its output shard; publish the shard with its last batch."""
        task = _task(pl_module)
        datamodule = task.datamodule
        if batch.errors and datamodule.on_error == "raise":
            self._abandon()
            error = batch.errors[0]
            raise RunError(f"shard {error.shard}, sample {error.key!r}: {error.reason}")
        if self._shard is None:
            self._shard = _OpenShard(self.output, batch.shard, self.layout, task.info)
        shard = self._shard
        if shard.name != batch.shard or shard.position != batch.start:
            self._abandon()
            raise RunError(
                f"shard {shard.name} broke off at sample {shard.position} (then came {batch.shard} at "
                f"{batch.start}): its file changed while it was read, or a loader failed; run again"
            )
        shard.position = batch.end
        shard.errors += batch.errors
        for result in prediction:
            members = dict(result.members)
            if self.overlays and result.overlays:
                members |= result.overlays()
            shard.add(result.key, members)
        if batch.last:
            states = task.pop_metric_state()
            self._shard = None
            if batch.total or not batch.errors:
                shard.publish(states)
                self._count(task, batch.total, len(shard.errors))
            else:
                shard.abandon()
                self._note_lost_shard(batch.errors)
                lost = datamodule.sample_counts().get(batch.shard, 1)
                self._count(task, lost, lost)

    def _note_lost_shard(self, errors: list[SampleError]) -> None:
        for error in errors:
            log.error("shard %s is left out: %s", error.shard, error.reason)
            path = self.output / f"{error.shard}.error.json"
            write_atomically(path, json.dumps(list(error), ensure_ascii=False))

    def _count(self, task: Task, seen: int, bad: int) -> None:
        self._seen += seen
        self._bad += bad
        limit = task.datamodule.max_error_rate
        # Over fewer samples than this a share means nothing: one bad photo of five is no disaster.
        if self._bad > limit * max(self._seen, 1000):
            if task.trainer.is_global_zero:
                summarise(self.output, task, task.info)
            raise RunError(
                f"{self._bad} of {self._seen} samples are bad, more than --data.max_error_rate {limit} "
                f"allows; finished shards and errors.jsonl are in {self.output}"
            )

    def _abandon(self) -> None:
        if self._shard:
            self._shard.abandon()
            self._shard = None

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Drop the unfinished shard."""
        self._abandon()

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Merge the states of all shards and write the run's summary, on rank 0."""
        trainer.strategy.barrier()
        if trainer.is_global_zero:
            self.report = summarise(self.output, _task(pl_module), _task(pl_module).info)


class _OpenShard:
    """An output shard under way, in a hidden file or folder beside its place."""

    def __init__(self, folder: Path, name: str, layout: str, info: DatasetInfo) -> None:
        self.name = name
        self.position = 0
        self.images = 0
        self.errors: list[SampleError] = []
        self.palette = info.flat_palette()
        self.final = folder / (f"{name}.tar" if layout == "tar" else name)
        self.partial = folder / f".{self.final.name}.{os.getpid()}.partial"
        self.tar: TarWriter | None = None
        if layout == "tar":
            self.file = open(self.partial, "wb")  # noqa: SIM115  (closed by publish or abandon)
            self.tar = TarWriter(
                self.file, "root", "root", 0o644, encoder=False, mtime=0, format="GNU_FORMAT"
            )
        else:
            self.partial.mkdir()

    def add(self, key: str, members: dict[str, Any]) -> None:
        """Append the results of one image."""
        self._write(key, {k: encode(k, v, self.palette) for k, v in members.items()})
        self.images += 1

    def _write(self, key: str, members: dict[str, bytes]) -> None:
        if self.tar:
            self.tar.write({"__key__": key, **members})
            return
        for ending, data in members.items():
            path = self.partial / f"{key}.{ending}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)

    def publish(self, states: dict[str, Tensor]) -> None:
        """Give the shard its final name, with its record inside."""
        for key, members in ShardRecord(self.images, self.errors, states).members().items():
            self._write(key, members)
        if self.tar:
            self.tar.close()
            self.file.flush()
            os.fsync(self.file.fileno())
            self.file.close()
        self.partial.replace(self.final)

    def abandon(self) -> None:
        """Remove what was written."""
        if self.tar:
            self.file.close()
            self.partial.unlink(missing_ok=True)
        else:
            shutil.rmtree(self.partial, ignore_errors=True)


def read_run(folder: Path) -> tuple[Task, DatasetInfo]:
    """The task, without its backbone, and the data set of a run.

    Raises:
        RunError: the folder holds no run.
    """
    try:
        run = json.loads((folder / "run.json").read_text())
    except (OSError, ValueError) as error:
        raise RunError(f"{folder} is not a run's folder: {error}") from None
    settings = dict(run["identity"]["task"])
    name = settings.pop("class")
    if name not in TASKS.values():
        raise RunError(f"{folder} is a run of an unknown task {name!r}")
    config = BackboneConfig(**settings.pop("backbone"))
    task: Task = getattr(tasks, name)(config, **settings)
    return task, DatasetInfo(**{k: _tuples(v) for k, v in run["info"].items()})


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


def summarise(folder: Path, task: Task, info: DatasetInfo) -> Report:
    """Merge the records of all published shards in shard order, and write the run's summary files.

    Writes ``metrics.json``, ``metrics.csv`` (class-wise) and ``errors.jsonl``.
    """
    metrics = task.configure_metrics(info)
    images, errors, done = 0, [], 0
    names = json.loads((folder / "run.json").read_text())["shards"]
    for name in names:
        record = _published(folder, name)
        if isinstance(record, SampleError):
            errors.append(record)
        elif record:
            done += 1
            images += record.images
            errors += record.errors
            merge_states(metrics, record.states)
    report = task.report(metrics, info)
    summary = {
        "metrics": report.metrics,
        "per_class": report.per_class,
        "details": report.details,
        "images": images,
        "errors": len(errors),
        "shards": {"done": done, "of": len(names)},
    }
    write_atomically(folder / "metrics.json", json.dumps(_finite(summary), indent=1))
    write_atomically(folder / "metrics.csv", _csv(report))
    lines = (
        json.dumps({"shard": e.shard, "key": e.key, "reason": e.reason}, ensure_ascii=False)
        for e in errors
    )
    write_atomically(folder / "errors.jsonl", "".join(f"{line}\n" for line in lines))
    return report


def _published(folder: Path, name: str) -> ShardRecord | SampleError | None:
    for path in (folder / f"{name}.tar", folder / name):
        if path.exists():
            return ShardRecord.load(path)
    lost = folder / f"{name}.error.json"
    return SampleError(*json.loads(lost.read_text())) if lost.exists() else None


def merge_states(metrics: dict[str, Metric], states: dict[str, Tensor]) -> None:
    """Add the states of one shard, as `Task.pop_metric_state` gave them, to ``metrics``."""
    for name, metric in metrics.items():
        prefix = f"{name}."
        part = {k.removeprefix(prefix): v for k, v in states.items() if k.startswith(prefix)}
        if part:
            lists = {
                k: [v] if isinstance(metric._defaults[k], list) else v for k, v in part.items()
            }
            metric.merge_state(lists)


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """A nested dict as dotted key -> value."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {
        k: v
        for key, value in tree.items()
        for k, v in flatten(value, f"{prefix}.{key}" if prefix else str(key)).items()
    }


def _csv(report: Report) -> str:
    columns = list(dict.fromkeys(c for values in report.per_class.values() for c in values))
    buffer = io.StringIO()
    table = csv.writer(buffer, lineterminator="\n")
    table.writerow(["class", *columns])
    for name, values in report.per_class.items():
        table.writerow([name, *(values.get(c, "") for c in columns)])
    for name, value in report.metrics.items():
        table.writerow([name, value])
    return buffer.getvalue()


def _finite(value: Any) -> Any:
    """``value`` with NaN as null: JSON knows no NaN."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, float) and value != value:
        return None
    return value


def _task(module: LightningModule) -> Task:
    if not isinstance(module, Task):
        raise TypeError(f"the writer needs one of the project's tasks, got {type(module).__name__}")
    return module
