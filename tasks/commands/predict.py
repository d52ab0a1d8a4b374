"""``lightning predict``: LightningCLI over our tasks, DataModules and the writer."""

from __future__ import annotations

import errno
import logging
import os
import signal
import sys
import warnings
from contextlib import suppress
from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist
import yaml
from jsonargparse import get_loader, set_loader
from lightning.fabric.plugins.environments import LightningEnvironment, SLURMEnvironment
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.strategies import ParallelStrategy

from common.errors import UserError
from datamodules import DATASETS, ShardDataModule
from datamodules._remote import without_query
from tasks import TASKS
from tasks._configs import with_class_paths, with_paths
from tasks._progress import ImageProgress
from tasks.base import Task
from tasks.run import Stopped
from tasks.run.callback import ResultWriter
from tasks.run.terminal import print_report

_load_yaml = get_loader("yaml")
set_loader("yaml", lambda text: with_class_paths(_load_yaml(text)), (yaml.YAMLError,))


def main(argv: list[str]) -> int:
    """Run ``lightning predict``; returns the exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    for wing in ("surgery", "datamodules", "tasks"):
        logging.getLogger(wing).setLevel(logging.INFO)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    if {"-h", "--help"}.intersection(argv):
        import_all()  # the help lists those that are imported
    # Noise that a user can do nothing about.
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*LightningCLI's args parameter.*")
    warnings.filterwarnings("ignore", ".*treespec, LeafSpec.*")
    warnings.filterwarnings("ignore", ".*persistent_workers.*")
    warnings.filterwarnings("ignore", ".*Couldn't infer the batch indices.*")
    try:
        cli = PredictCLI(args=with_paths(argv))
        cli.trainer.predict(cli.model, datamodule=cli.datamodule, return_predictions=False)
    except Stopped as error:
        print(f"lightning predict: {error}", file=sys.stderr)
        leave_group()
        # Lightning kills the process that it was started in when one that it launched fails; that
        # one may have a batch to end, and says itself that it was stopped.
        launched = isinstance(cli.trainer.strategy, ParallelStrategy) and isinstance(
            cli.trainer.strategy.cluster_environment, LightningEnvironment
        )
        return 0 if launched and cli.trainer.local_rank > 0 else 128 + signal.SIGTERM
    except Exception as error:
        hint = explain(error)
        if hint is None or os.environ.get("CLIP_SURGERY_TRACEBACK"):
            raise
        print(f"lightning predict: {hint}", file=sys.stderr)
        return 1
    leave_group()
    if cli.trainer.is_global_zero:
        print_report(cli.writer.run, cli.writer.tally)
        if failure := cli.writer.tally.verdict():
            print(f"lightning predict: {failure}", file=sys.stderr)
            return 1
    return 0


def leave_group() -> None:
    """Leave the other processes; else gloo's threads may abort this one as it exits."""
    if dist.is_initialized():
        with suppress(RuntimeError):  # the others may be gone
            dist.destroy_process_group()


def import_all() -> None:
    """Import all tasks and data sets; a run imports only its own."""
    for name in TASKS:
        import_module(f"tasks.{name}")
    for name in DATASETS:
        import_module(f"datamodules.{name}")


def explain(error: Exception) -> str | None:
    """What a user should know of an error, and do; None for one that is our own fault."""
    again = "Finished shards are kept: run the same command again to go on"
    if isinstance(error, UserError | FileNotFoundError):
        return f"{error}"
    if isinstance(error, ConnectionError | EOFError):
        # Where a loader worker is killed while it hands over a batch.
        return f"a loader worker or another process of the run died ({error!r}). {again}"
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
    if isinstance(error, RuntimeError) and "DataLoader worker" in str(error):
        return (
            f"a loader worker died, often for lack of memory ({str(error).splitlines()[0]}). Fewer "
            f"--data.num_workers need less. {again}"
        )
    return None


class PredictCLI(LightningCLI):
    """The parser of ``predict``: a task, a DataModule, the writer and the Trainer."""

    writer: ResultWriter

    def __init__(self, args: list[str]) -> None:
        super().__init__(
            Task,
            ShardDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=None,
            seed_everything_default=False,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            parser_kwargs={"prog": "lightning predict", "description": main.__doc__},
            trainer_defaults={
                "logger": False,
                "enable_checkpointing": False,
                "enable_model_summary": False,
                "use_distributed_sampler": False,
            },
            args=args,
            run=False,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the writer's fields."""
        parser.add_lightning_class_args(ResultWriter, "writer")

    def instantiate_classes(self) -> None:
        """Make the objects; what a constructor refuses reaches the user in its own words."""
        try:
            super().instantiate_classes()
        except ValueError as error:
            cause: BaseException = error
            while str(cause).startswith("Does not validate") and cause.__cause__:
                cause = cause.__cause__  # jsonargparse's wrapping lists all that it tried
            raise cause from None

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse; a null that was given on the command line stays one."""
        super().parse_arguments(parser, args)
        # jsonargparse hands nested values on as text, where null has become "None".
        for key, value in self.config.items():
            if value == "None":
                self.config[key] = None

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """The Trainer, with the writer and a progress bar that counts images."""
        self.writer = self._get(self.config_init, "writer")
        self.writer.config = without_query(self.parser.dump(self.config, skip_unset=False))
        # Under SLURM, Lightning would load a checkpoint that a training left in this folder.
        if self.config.trainer.default_root_dir is None:
            kwargs["default_root_dir"] = str(self.writer.output)
        if SLURMEnvironment.detect() and not self.config.trainer.plugins:
            # Else SIGUSR1 would save such a checkpoint; our batch scripts put the job back.
            kwargs["plugins"] = [SLURMEnvironment(auto_requeue=False)]
        if self.config.trainer.enable_progress_bar is not False:
            theirs = self._get(self.config_init, "trainer").get("callbacks") or []
            kwargs["callbacks"] = [
                *(theirs if isinstance(theirs, list) else [theirs]),
                ImageProgress(),
            ]
        return super().instantiate_trainer(**kwargs)
