"""``lightning predict``: run a task over shards, and end with the exit code that its end deserves."""

from __future__ import annotations

import errno
import logging
import os
import sys
import warnings

import torch

from common import signals
from common.errors import UserError
from common.files import raise_open_files
from tasks._configs import InvalidConfig
from tasks._help import help_asked
from tasks._predict import Predict, read_words
from tasks._ranks import Ranks
from tasks.run.processes import leave_at_once, leave_group
from tasks.run.terminal import print_report


def main(argv: list[str]) -> int:
    """Run ``lightning predict``; returns the exit code."""
    prepare()
    ranks = Ranks(["predict", *argv])
    topic, words = help_asked(argv)
    try:
        cli = Predict(*read_words(words), ranks, topic)
        ranks.start(cli.trainer)
        run = cli.predict()
    except (signals.Stopped, Exception) as raised:
        # A stop, or another's end, wins over what it causes.
        error = signals.reason() or ranks.failure() or raised
        ranks.break_off(error)
        code, line = 1, explain(error)
        if isinstance(error, signals.Stopped):
            code, line = error.code, f"{error}; finished shards are kept, run again to go on"
        elif isinstance(error, InvalidConfig):
            code = 2
        elif line is None or os.environ.get("CLIP_SURGERY_TRACEBACK"):
            raise
        if code < 128 or signals.speaks():
            print(f"lightning predict: {line}", file=sys.stderr)
        leave_at_once(code)
        return code
    leave_group()
    ranks.end()
    if cli.trainer.is_global_zero:
        print_report(run, cli.writer.tally)
        if failure := cli.writer.tally.verdict():
            print(f"lightning predict: {failure}", file=sys.stderr)
            return 1
    return 0


def prepare() -> None:
    """Let our wings speak and others be quiet, and have enough open files: before the first run."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    for wing in ("surgery", "datamodules", "tasks"):
        logging.getLogger(wing).setLevel(logging.INFO)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    # Noise that a user can do nothing about.
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*treespec, LeafSpec.*")
    warnings.filterwarnings("ignore", ".*persistent_workers.*")
    warnings.filterwarnings("ignore", ".*`srun` command is available.*")
    warnings.filterwarnings("ignore", ".*Couldn't infer the batch indices.*")
    raise_open_files()


def explain(error: BaseException) -> str | None:
    """What a user should know of an error, and do; None for one that is our own fault."""
    again = "Finished shards are kept: run the same command again to go on"
    if isinstance(error, UserError | FileNotFoundError):
        return f"{error}"
    if isinstance(error, ConnectionError | EOFError):
        return f"another process of the run died ({error!r}). {again}"
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"the disk is full ({error}). Make room. {again}"
    if isinstance(error, OSError):
        return f"{error}. {again}"
    compiling = sys.modules.get("torch._dynamo.exc")  # heavy; there if anything was compiled
    if compiling and isinstance(error, compiling.TorchDynamoException):
        return (
            f"the image tower could not be compiled ({str(error).strip()[:200]}). torch.compile needs a "
            f"C++ compiler, on GPUs Triton; --model.backbone.compile false needs none. {again}"
        )
    if isinstance(error, torch.OutOfMemoryError):
        return f"one image doesn't fit the GPU's memory: a smaller --data.image_size may. {again}"
    return None
