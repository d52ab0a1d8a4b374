"""Lightning's events as steps of a run: its batches become output shards."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from datetime import datetime, timezone
from functools import partial
from importlib.metadata import version
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.loggers import Logger

from common import signals
from common.errors import InvalidSetting
from common.files import is_nan
from common.source import source_digest
from datamodules._loader import cores_of_rank
from datamodules._samples import Batch, SampleError
from surgery.visualize import colours
from tasks._draw import LOOK, Look
from tasks._task import Task
from tasks._text_features import digest_of_texts
from tasks._transfer import Later, bring
from tasks.measures import Report, path_of
from tasks.run.device import agree_on_attention, describe_device
from tasks.run.errors import RunError
from tasks.run.folder import Run
from tasks.run.image import ImageResult
from tasks.run.memory import peak, reset_peak
from tasks.run.place import files_in, in_store, place_of
from tasks.run.processes import Processes, shared_counts
from tasks.run.shard import OutputShard, ShardRecord, find_shards, load_states
from tasks.run.summary import Published
from tasks.run.tally import Tally
from tasks.run.writer_thread import WriterThread

log = logging.getLogger(__name__)

_MOST_ENCODERS = 8
_CORES_AN_ENCODER = 4  # to decode a picture takes longer than to encode its results
_PACKAGES = ("clip-surgery-lightning", "torch", "open_clip_torch", "lightning", "pillow")


class ResultWriter(BasePredictionWriter):
    """Writes a run's folder.

    One ``NAME.tar`` (or folder ``NAME/``) an input shard, which appears when the shard is finished,
    with its metric state inside; at the end ``metrics.json``, ``metrics.csv`` and ``errors.jsonl``. The
    folder remembers what it is a run of (``run.json``): the same run started again goes on with the
    shards that are missing, another one is refused.

    Args:
        output: folder of the run, on this machine or in an object store (``s3://bucket/run`` with the
            extra ``s3``, ``gs://`` with ``gcs``).
        layout: ``tar`` writes shards, ``files`` a folder of plain files in place of each.
        overlays: also write heat maps over the images (JPEG): of all, or of so many first ones of each
            shard.
        overlay_alpha: share of the heat's colours in them, in [0, 1].
        overlay_colours: their colour map: ``jet``, or another of matplotlib's, such as ``viridis``.
        overlay_classes: maps of so many classes an image (words, of `Opinions`), those with the highest
            similarity; by default of those that have a mask.
        overwrite: replace an earlier run in the folder, once this one is known to be valid.
    """

    run: Run
    """What is written to; there from `setup` on."""

    tally: Tally
    """Samples and shards of the job, of all its processes: as of this one's last shard; at the end, on
    rank 0, of all that there is."""

    def __init__(
        self,
        output: str = "runs/latest",
        layout: Literal["tar", "files"] = "tar",
        overlays: bool | int = False,
        overlay_alpha: float = LOOK.alpha,
        overlay_colours: str = LOOK.colour_map,
        overlay_classes: int | None = LOOK.classes,
        overwrite: bool = False,
    ) -> None:
        super().__init__("batch")
        if overlays < 0:
            raise InvalidSetting(f"--writer.overlays: true, false or how many, got {overlays}")
        if not 0 <= overlay_alpha <= 1:
            raise InvalidSetting(
                f"--writer.overlay_alpha is a share in [0, 1], got {overlay_alpha}"
            )
        if overlay_classes is not None and overlay_classes < 1:
            raise InvalidSetting(
                f"--writer.overlay_classes must be at least 1, got {overlay_classes}"
            )
        colours(torch.zeros(1), overlay_colours)  # refuses one that nobody knows
        self.look = Look(overlay_alpha, overlay_colours, overlay_classes)
        self.output = place_of(output)
        if layout == "files" and in_store(self.output):
            raise InvalidSetting(
                f"--writer.layout files needs an --writer.output on this machine; to write to {output}, "
                "set --writer.layout tar"
            )
        self.layout = layout
        self.overlays = overlays
        self.overwrite = overwrite
        self.config = ""
        self._processes = Processes()
        self._thread = WriterThread()
        self._shard: OutputShard | None = None
        self._began = datetime.now(timezone.utc)
        self._mine: list[str] = []
        self._published: list[str] = []  # by this process

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Open the run's folder, and tell the datamodule which shards are finished."""
        task = _task(pl_module)
        task.draws, task.look = bool(self.overlays), self.look
        data = task.datamodule
        self._mine = [name for name, _ in data.part_list()]
        if trainer.is_global_zero:
            self.run = Run.open(
                self.output,
                self._describe(task),
                mine=self._mine,
                part=data.part,
                parts=data.parts,
                overwrite=self.overwrite,
            )
            if self.run.finished:
                log.info(
                    "%d shards are finished already in %s", len(self.run.finished), self.output
                )
        self._thread.encoders = _encoders(trainer)
        self._processes.connect(trainer)
        opened: tuple[dict[str, Any], list[str]] = ({}, [])
        if trainer.is_global_zero:
            # What tells changed input shards apart is the most of it, and rank 0's alone.
            sent = {k: v for k, v in self.run.described.items() if k != "contents"}
            opened = (sent, self.run.finished)
        described, finished = trainer.strategy.broadcast(opened, src=0)
        if not trainer.is_global_zero:
            self.run = Run(self.output, described)
        data.wanted = replace(data.wanted, finished=frozenset(finished))
        self.tally = Tally(data.max_error_rate, len(self._mine), shared_counts(trainer))
        self.tally.resume(self.run.records)

    def _describe(self, task: Task) -> dict[str, Any]:
        """What ``run.json`` holds, as far as it is known before the weights are loaded."""
        return {
            "identity": {
                "task": {"class": type(task).__name__, **task.settings()},
                "data": task.datamodule.settings(),
                "texts": digest_of_texts(task.text_files()),
                "writer": {"layout": self.layout, "overlays": self._overlays()},
                "precision": str(task.trainer.precision),
            },
            "shards": [name for name, _ in task.datamodule.shard_list()],
            "contents": task.datamodule.contents(),
            "info": asdict(task.info),
            "measures": path_of(task.measured_by),
            **task.described(),
            "versions": {name: version(name) for name in _PACKAGES} | {"source": source_digest()},
        }

    def _overlays(self) -> bool | int | dict[str, Any]:
        """Which pictures are drawn; how, only where it is another way than always: older runs go on."""
        if not self.overlays or self.look == LOOK:
            return self.overlays
        return {"of": self.overlays, **asdict(self.look)}

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Now that the weights are known: check them too, and begin."""
        signals.only_note()  # from now on there are shards to finish or to drop
        attention = agree_on_attention(trainer, self.run.earlier.get("device", {}))
        if trainer.is_global_zero:
            task = _task(pl_module)
            weights = task.backbone.checkpoint
            more = {
                "identity": task.fingerprints(),
                "checkpoint": {**asdict(weights), "sha256": weights.sha256},
                "device": {**describe_device(trainer), **attention},
            }
            self.run.accept(self._mine, more, self.config)
            log.info("%s", _describe_run(task, more["device"]["name"]))
        self._processes.wait()  # nobody may publish into a folder that rank 0 refuses
        # With the weights': all processes look whether a store's folder is still this run's.
        self.run.described["identity"] = trainer.strategy.broadcast(self.run.settings, src=0)
        reset_peak(trainer.strategy.root_device)
        self._began = datetime.now(timezone.utc)

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
        """Hand a batch over to its output shard, and the shard itself with its last batch."""
        task = _task(pl_module)
        if batch.errors and task.datamodule.on_error == "raise":
            error = batch.errors[0]
            raise RunError(f"shard {error.shard}, sample {error.key!r}: {error.reason}")
        if batch.errors and not batch.total:
            self._lose(batch)
        else:
            self._write(task, prediction, batch)
        signals.check()  # a shard that is whole by now is published even so
        if batch.last and (reason := self.tally.too_much()):
            self._thread.finish()
            self.tally.stop(lambda: self.run.summarise(task.new_measures()))
            raise RunError(f"{reason}; finished shards and errors.jsonl are in {self.output}")

    def _write(self, task: Task, prediction: Sequence[ImageResult], batch: Batch) -> None:
        if self._shard is None:
            self._shard = self.run.shard(batch.shard)
        shard = self._shard
        if shard.name != batch.shard or shard.position != batch.start:
            raise RunError(
                f"shard {shard.name} broke off at sample {shard.position} (then came {batch.shard} at "
                f"{batch.start}): its file changed while it was read, or a loader failed; run again"
            )
        if task.draws and self.overlays is not True:
            left = max(self.overlays - (shard.position - len(shard.errors)), 0)
            prediction = Later(len(prediction), partial(_draw_first, left, prediction))
        shard.position = batch.end
        shard.errors += batch.errors
        self._thread.add(shard, prediction)
        if batch.last:
            self._thread.publish(shard, bring(task.measures.pop()))
            self._published.append(shard.name)
            self._shard = None  # the thread's now
            self.tally.add(shard.position - len(shard.errors), len(shard.errors))

    def _lose(self, batch: Batch) -> None:
        for error in batch.errors:
            log.error("shard %s is left out: %s", error.shard, error.reason)
            self.run.note_loss(error)
            self.tally.lose(error)

    def _drop(self) -> None:
        """Drop the unfinished shard."""
        self._thread.drop()
        if self._shard:
            self._shard.abandon()
            self._shard = None

    def _leave(self) -> None:
        """Drop the unfinished shard, and leave the folder to others."""
        self._drop()
        if hasattr(self, "run"):
            self.run.close()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Drop the unfinished shard."""
        self._leave()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the folder to others."""
        self._leave()

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Merge the states of all shards and write the run's summary, on rank 0."""
        self._thread.finish()
        if self._shard:
            log.warning("shard %s was not read to its end: it is left out", self._shard.name)
            self._drop()
        elsewhere: dict[str, Published] = {}
        finished = {*self.run.finished, *self._published}
        if trainer.world_size > 1:
            elsewhere, published = self._fetch_records()
            finished |= published
        if trainer.is_global_zero:
            report, found = self.run.summarise(_task(pl_module).new_measures(), elsewhere)
            # Looked for anew: one may have been taken away while they were merged.
            there = set(self.run.places()) if in_store(self.output) else set(found)
            self.tally = Tally(self.tally.limit, len(self._mine))
            for name in self._mine:
                record = found.get(name)
                if isinstance(record, ShardRecord):
                    self.tally.add(record.images, len(record.errors))
                elif record:
                    self.tally.lose(record)
                if name in finished and not (name in there and isinstance(record, ShardRecord)):
                    self.tally.take_away(name)
            self._note_job(found, trainer)
            self._tell_loggers(trainer.loggers, report)

    def _note_job(self, found: Mapping[str, ShardRecord | SampleError], trainer: Trainer) -> None:
        """Write down how long this job took, from its first batch on, for how many images, and memory."""
        before = set(self.run.finished)
        new = [found.get(name) for name in self._mine if name not in before]
        records = [record for record in new if isinstance(record, ShardRecord)]
        if records:
            seconds = (datetime.now(timezone.utc) - self._began).total_seconds()
            most = peak(trainer.strategy.root_device)
            self.run.note_job(
                {
                    "began": self._began.isoformat(timespec="seconds"),
                    "seconds": round(seconds, 3),
                    "images": sum(record.images for record in records),
                    "processes": trainer.world_size,
                    "peak_memory_mib": None if most is None else round(most / 2**20),
                }
            )

    def _tell_loggers(self, loggers: Sequence[Logger], report: Report) -> None:
        """Give the metrics to the loggers that the user set, those of further methods by their names."""
        named = {"": report.metrics} | {
            f"{method}/": values for method, values in [*report.methods.items()][1:]
        }
        values = {
            f"{prefix}{name}": value
            for prefix, metrics in named.items()
            for name, value in metrics.items()
            if not is_nan(value)
        }
        counts = {"images": self.tally.images, "errors": self.tally.bad + len(self.tally.lost)}
        for logger in loggers:
            logger.log_hyperparams(self.run.settings)
            logger.log_metrics({**values, **counts}, step=self.tally.images)

    def _fetch_records(self) -> tuple[dict[str, Published], set[str]]:
        """Wait for all ranks; on rank 0, what they hold of shards that its file system doesn't show.

        Returns:
            That, and the names of the shards that all ranks have published; nothing on the others.
        """
        rank, world = dist.get_rank(), dist.get_world_size()
        self._processes.wait()
        group = self._processes.group
        missing = [self.run.missing()]
        dist.broadcast_object_list(missing, src=0, group=group)
        there = files_in(self.output) if missing[0] else {}
        mine = {n: load_states(path) for n, path in find_shards(there, missing[0]).items()}
        gathered: list[Any] | None = [None] * world if rank == 0 else None
        dist.gather_object((mine, self._published), gathered, dst=0, group=group)
        parts = gathered or []
        elsewhere = {name: record for held, _ in parts for name, record in held.items()}
        return elsewhere, {name for _, published in parts for name in published}


def _draw_first(count: int, results: Sequence[ImageResult]) -> list[ImageResult]:
    """Results of which only so many first ones are drawn."""
    return [*results[:count], *(replace(result, draw=None) for result in results[count:])]


def _encoders(trainer: Trainer) -> int:
    """Threads that encode results: one, where the model itself wants the cores."""
    if trainer.strategy.root_device.type == "cpu":
        return 1
    return max(1, min(_MOST_ENCODERS, cores_of_rank(trainer.num_devices) // _CORES_AN_ENCODER))


def _describe_run(task: Task, device: str) -> str:
    """What was loaded, from where, and on what it is computed: a line."""
    strategy, world = task.trainer.strategy, task.trainer.world_size
    others = f", {world} processes" if world > 1 else ""
    return (
        f"{type(task).__name__} of {task.info.name}: {' and '.join(task.networks())}, on "
        f"{strategy.root_device} ({device}{others}), precision {task.trainer.precision}"
    )


def _task(module: LightningModule) -> Task:
    if not isinstance(module, Task):
        raise TypeError(f"the writer needs one of the project's tasks, got {type(module).__name__}")
    return module
