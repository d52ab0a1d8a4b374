"""The runs of tables and figures: done, gone on with, or named with what they lack."""

from __future__ import annotations

import logging
import shutil
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from common import signals
from common.errors import UserError
from tasks.reproduce.plan import Job, jobs
from tasks.reproduce.report import Reproduction
from tasks.run import Run

log = logging.getLogger(__name__)


def run_all(
    found: Reproduction,
    output: Path,
    *,
    data_root: Path = Path("shards"),
    scenes: int | None = None,
    fields: Mapping[str, Any] | None = None,
    tell: Callable[[str], None] = log.info,
) -> bool:
    """Do the runs of a table, or go on with them; it is written anew after each.

    Args:
        found: the table, filled on the way.
        output: folder of the table; runs are below ``runs``.
        data_root: folder of the data sets' shards, each in a folder of its name.
        scenes: of the demo world; None for its 48.
        fields: of every run, as `tasks.predict` takes them.
        tell: hears of each run.

    Returns:
        Whether no run failed. What has no data is not a failure.
    """
    todo = jobs(found.cells, found.demo)
    good = True
    first = signals.speaks()  # one process of those that share the runs writes and tells
    for i, job in enumerate(todo, start=1):
        if first:
            tell(f"[{i}/{len(todo)}] {job.name}")
        reason = missing(job, data_root, found.demo)
        if reason is None:
            try:
                run = _predict(job, output, data_root, found.demo, scenes, fields or {})
                if first:
                    found.fill(job, run)
                    _lay_beside(found, run.folder, output)
            except Exception as error:
                signals.check()  # a stop wins over what it causes
                good = False
                reason = f"the run failed: {' '.join(str(error).split()) or repr(error)}"
                if not isinstance(error, UserError | OSError):  # our fault: the others still go on
                    traceback.print_exc()
        if reason is not None:
            found.why |= dict.fromkeys(job.cells, reason)
            if first:
                tell(f"    {reason}")
        if first:
            found.write(output)
    return good


def missing(job: Job, data_root: Path, demo: bool = False) -> str | None:
    """What a run lacks, and how to get it; None if nothing."""
    from datamodules._shards import tars_in

    learned = [value for value in map(str, job.fields.values()) if value.endswith(".safetensors")]
    if demo:
        return "the demo has no learned prompts" if learned else None
    folder = data_root / job.shards
    if not tars_in(str(folder)):
        return f"no shards in {folder}; make them: {job.shards_command(folder)}"
    for value in learned:
        if not (data_root / value).is_file():
            return f"no {data_root / value}: features of TaI-DPT's learned prompts"
    return None


def _predict(
    job: Job,
    output: Path,
    data_root: Path,
    demo: bool,
    scenes: int | None,
    fields: Mapping[str, Any],
) -> Run:
    """Do a job's run, or go on with it."""
    import tasks

    config: Any = job.config
    own = {
        name: str(data_root / value) if str(value).endswith(".safetensors") else value
        for name, value in job.fields.items()
    }
    if demo:
        shards = str(output / "shards" / f"shapes-{scenes or 'demo'}")
        config = {
            "model": {
                "class_path": job.task,
                "init_args": {"backbone": {"model": "demo", "pretrained": "demo"}},
            },
            "data": {
                "class_path": "Shapes",
                "init_args": {"shards": shards, **({"scenes": scenes} if scenes else {})},
            },
        }
    else:
        own |= {"data.shards": str(data_root / job.shards), "model": {"class_path": job.task}}
    folder = str(output / "runs" / job.name)
    return tasks.predict(config, **{**own, "trainer.devices": 1, **fields, "writer.output": folder})


def _lay_beside(found: Reproduction, run: Path, output: Path) -> None:
    """Copy what a figure's run has drawn and listed to the figure."""
    for table in found.plan.beside:
        for ending in ("csv", "png"):
            if (run / f"{table}.{ending}").is_file():
                target = output / f"{found.plan.name}-{table}.{ending}"
                shutil.copyfile(run / f"{table}.{ending}", target)
