"""The runs of tables and figures: done, gone on with, or named with what they lack."""

from __future__ import annotations

import logging
import os
import shutil
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from common import signals
from common.errors import UserError
from tasks.reproduce.plan import Job, Plan, jobs
from tasks.reproduce.report import Reproduction
from tasks.run import Run

log = logging.getLogger(__name__)

_OF_KNOWN_CHANNELS = ("rf_clip", "rf_clip_refocused")


def run_all(
    wanted: Sequence[Reproduction],
    output: Path,
    *,
    data_root: Path = Path("shards"),
    scenes: int | None = None,
    fields: Mapping[str, Any] | None = None,
    tell: Callable[[str], None] = log.info,
) -> bool:
    """Do the runs of tables, or go on with them; a table is written anew after each of its runs.

    What several tables need is run once.

    Args:
        wanted: the tables, filled on the way; all of the demo world, or none.
        output: folder of the tables; runs are below ``runs``.
        data_root: folder of the data sets' shards, each in a folder of its name.
        scenes: of the demo world; None for its 48.
        fields: of every run, as `tasks.predict` takes them; see `processes`.
        tell: hears of each run.

    Returns:
        Whether no run failed. What has no data is not a failure.

    Raises:
        Exception: a run failed that several processes share; otherwise the next ones are done.
    """
    import torch.distributed as dist

    demo = wanted[0].demo
    todo = jobs([cell for found in wanted for cell in found.cells], demo)
    good = True
    first = signals.speaks()  # one process of those that share the runs writes and tells
    for i, job in enumerate(todo, start=1):
        if first:
            tell(f"[{i}/{len(todo)}] {job.name}")
        run, reason = None, missing(job, data_root, demo)
        if reason is None:
            try:
                run = _predict(job, output, data_root, demo, scenes, fields or {})
            except Exception as error:
                signals.check()  # a stop wins over what it causes
                if dist.is_initialized() and dist.get_world_size() > 1:
                    raise  # the others may be anywhere
                good = False
                said = " ".join(str(error).split()) or repr(error)
                reason = f"the run failed: {said.replace('--writer.output', '--output')}"
                if not isinstance(error, UserError | OSError):  # our fault: the others still go on
                    traceback.print_exc()
        if not first:
            continue
        if reason is not None:
            tell(f"    {reason}")
        for found in wanted:
            if not (cells := [cell for cell in job.cells if cell in found.cells]):
                continue
            if run is None:
                found.why |= dict.fromkeys(cells, str(reason))
            else:
                found.fill(cells, run, job.name)
                _lay_beside(found.plan, run, output)
            found.write(output)
    return good


def processes() -> dict[str, int]:
    """How many processes torchrun or srun has started, as fields of a run: one without them."""
    from lightning.fabric.plugins.environments import SLURMEnvironment

    env = os.environ
    world, here = env.get("WORLD_SIZE"), env.get("LOCAL_WORLD_SIZE")
    if not (world and here) and SLURMEnvironment.detect():
        world = env["SLURM_NTASKS"]
        here = str(int(world) // int(env.get("SLURM_NNODES", "1")))
    devices = int(here or 1)
    return {"trainer.devices": devices, "trainer.num_nodes": int(world or 1) // devices}


def missing(job: Job, data_root: Path, demo: bool = False) -> str | None:
    """What a run lacks, and how to get it; None if nothing."""
    from datamodules._shards import tars_in

    learned = [value for value in map(str, job.fields.values()) if value.endswith(".safetensors")]
    if demo:
        if job.fields.get("model.backbone.attention") in _OF_KNOWN_CHANNELS:
            return "which channels sink is known of OpenAI's towers only, not of the demo's"
        return "the demo has no learned prompts" if learned else None
    folder = data_root / job.shards
    if not tars_in(str(folder)):
        command = job.shards_command(folder)
        help = " ".join(command.split()[:3])
        return f"no shards in {folder}; make them: {command} ({help} --help: where from)"
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


def _lay_beside(plan: Plan, run: Run, output: Path) -> None:
    """Copy what a figure's run has drawn and listed to the figure."""
    for table in plan.beside:
        for ending in ("csv", "png"):
            file = run.folder / f"{table}.{ending}"
            if file.is_file():
                shutil.copyfile(file, output / f"{plan.name}-{file.name}")
    if plan.sheet:
        plan.sheet.draw(run, output / f"{plan.name}-{plan.sheet.prefix}png")
