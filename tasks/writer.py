"""Results out: one output shard an input shard, its metric state inside, published by one rename."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter

from datamodules.samples import Batch, SampleError
from tasks._background import Background
from tasks._files import write_atomically
from tasks._output import OutputShard, RunError, ShardRecord, Stopped, find_shard
from tasks._processes import Processes
from tasks.base import ImageResult, Task
from tasks.summary import summarise

log = logging.getLogger(__name__)


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
        self._before: dict[str, Any] = {}
        self._run: dict[str, Any] = {}
        self._processes = Processes()
        self._background = Background()  # encodes and writes while the next batch is computed
        self._shard: OutputShard | None = None
        self._seen = 0
        self._bad = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Prepare the run's folder, and tell the datamodule which shards are finished."""
        task = _task(pl_module)
        finished: list[str] = []
        if trainer.is_global_zero:
            finished = self._prepare(task)
        self._processes.connect(trainer)
        finished = trainer.strategy.broadcast(finished, src=0)
        task.datamodule.finished = frozenset(finished)
        if finished and trainer.is_global_zero:
            log.info("%d shards are finished already in %s", len(finished), self.output)

    def _prepare(self, task: Task) -> list[str]:
        marker = self.output / "run.json"
        names = [name for name, _ in task.datamodule.shard_list()]
        if self.overwrite and marker.exists():
            shutil.rmtree(self.output)
        if not marker.exists() and any(not _is_partial(p) for p in self.output.glob("*")):
            raise RunError(
                f"{self.output} is not empty and not a run of ours: choose another --writer.output"
            )
        before = json.loads(marker.read_text()) if marker.exists() else {}
        self._before = before.get("identity", {})
        self._run = self._describe(task, names)
        self._refuse_changes()
        self.output.mkdir(parents=True, exist_ok=True)
        mine = {name for name, _ in task.datamodule.part_list()}  # others may be under way
        for path in list(self.output.iterdir()):
            if leftover_of(path.name) in mine:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        finished = [name for name in names if find_shard(self.output, name)]
        self._refuse_other_shards(before.get("contents", {}), finished)
        return finished

    def _describe(self, task: Task, names: list[str]) -> dict[str, Any]:
        """What ``run.json`` holds; a run with another identity may not share the folder."""
        packages = ("clip-surgery-lightning", "torch", "open_clip_torch", "lightning", "pillow")
        run = {
            "identity": {
                "task": {"class": type(task).__name__, **task.settings()},
                "data": task.datamodule.settings(),
                "texts": sha256(Path(task.text_features).read_bytes()).hexdigest()
                if task.text_features
                else None,
                "writer": {"layout": self.layout, "overlays": self.overlays},
                "precision": str(task.trainer.precision),
            },
            "shards": names,
            "contents": task.datamodule.contents(),
            "info": asdict(task.info),
            "versions": {name: version(name) for name in packages},
        }
        return json.loads(json.dumps(run))  # as it will be read again: lists, not tuples

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Now that the weights are known: check them too, and write down what this run is."""
        self._processes.listen(trainer)
        if trainer.is_global_zero:
            self._write_down(_task(pl_module))
        self._processes.wait()  # nobody may publish into a folder that rank 0 refuses

    def _write_down(self, task: Task) -> None:
        backbone = task.backbone
        self._run["identity"]["weights"] = backbone.fingerprint()
        weights = backbone.checkpoint
        self._run["checkpoint"] = {**asdict(weights), "sha256": weights.sha256}
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

    def _refuse_other_shards(self, before: dict[str, str], finished: list[str]) -> None:
        """Refuse input shards that changed since their results were written; others may change."""
        now = self._run["contents"]
        for name in finished:
            old, new = before.get(name), now.get(name)
            if old and new and old != new:
                raise RunError(
                    f"{self.output} holds results of another shard {name} ({old}; now {new}). Delete "
                    "its output to have it done again, choose another --writer.output, or start anew "
                    "with --writer.overwrite true"
                )

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
            self._shard = OutputShard(self.output, batch.shard, self.layout, task.info)
        shard = self._shard
        if shard.name != batch.shard or shard.position != batch.start:
            self._abandon()
            raise RunError(
                f"shard {shard.name} broke off at sample {shard.position} (then came {batch.shard} at "
                f"{batch.start}): its file changed while it was read, or a loader failed; run again"
            )
        shard.position = batch.end
        shard.errors += batch.errors
        self._background.run(partial(self._add, shard, prediction))
        signal = self._processes.asked_to_stop or ("SIGTERM" if trainer.received_sigterm else "")
        if signal:
            self._abandon()
            raise Stopped(
                f"stopped by {signal}; finished shards are kept in {self.output}, run again to go on"
            )
        if batch.last:
            states = task.pop_metric_state()
            self._background.finish()
            self._shard = None
            if batch.total or not batch.errors:
                shard.publish(states)
                self._count(task, batch.total, len(shard.errors))
            else:
                shard.abandon()
                self._note_lost_shard(batch.errors)
                lost = datamodule.sample_counts().get(batch.shard, 1)
                self._count(task, lost, lost)

    def _add(self, shard: OutputShard, results: Sequence[ImageResult]) -> None:
        for result in results:
            members = dict(result.members)
            if self.overlays and result.overlays:
                members |= result.overlays()
            shard.add(result.key, members, result.rows or {})

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
        self._background.drop()
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
        if self._shard:
            log.warning("shard %s was not read to its end: it is left out", self._shard.name)
            self._abandon()
        elsewhere = self._fetch_records() if trainer.world_size > 1 else {}
        if trainer.is_global_zero:
            task = _task(pl_module)
            summarise(self.output, task, task.info, elsewhere)

    def _fetch_records(self) -> dict[str, ShardRecord]:
        """Wait for all ranks; on rank 0, the records of shards that its file system doesn't show."""
        rank, world = dist.get_rank(), dist.get_world_size()
        self._processes.wait()
        group = self._processes.group
        missing = [[n for n in self._run.get("shards", []) if not find_shard(self.output, n)]]
        dist.broadcast_object_list(missing, src=0, group=group)
        mine = {n: ShardRecord.load(p) for n in missing[0] if (p := find_shard(self.output, n))}
        gathered: list[Any] | None = [None] * world if rank == 0 else None
        dist.gather_object(mine, gathered, dst=0, group=group)
        return {name: record for part in gathered or [] for name, record in part.items()}


def leftover_of(file: str) -> str:
    """The shard that a partial output or a note of a lost shard belongs to; empty for others."""
    if file.endswith(".error.json"):
        return file.removesuffix(".error.json")
    if file.startswith(".") and file.endswith(".partial"):
        return file[1:].rsplit(".", 2)[0].removesuffix(".tar")
    return ""


def _is_partial(path: Path) -> bool:
    return path.name.endswith(".partial")


def _task(module: LightningModule) -> Task:
    if not isinstance(module, Task):
        raise TypeError(f"the writer needs one of the project's tasks, got {type(module).__name__}")
    return module


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """A nested dict as dotted key -> value."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {
        k: v
        for key, value in tree.items()
        for k, v in flatten(value, f"{prefix}.{key}" if prefix else str(key)).items()
    }
