"""``lightning predict``: LightningCLI over our tasks, DataModules and the writer."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from importlib import import_module
from typing import Any

from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from datamodules import DATASETS, ShardDataModule
from tasks import TASKS
from tasks._configs import with_paths
from tasks._progress import ImageProgress, print_report
from tasks.base import Task
from tasks.writer import ResultWriter, RunError


def main(argv: list[str]) -> int:
    """Run ``lightning predict``; returns the exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    for wing in ("surgery", "datamodules", "tasks"):
        logging.getLogger(wing).setLevel(logging.INFO)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for name in TASKS:
        import_module(f"tasks.{name}")
    for name in DATASETS:
        import_module(f"datamodules.{name}")
    # Noise that a user can do nothing about.
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*LightningCLI's args parameter.*")
    warnings.filterwarnings("ignore", ".*Couldn't infer the batch indices.*")
    try:
        cli = PredictCLI(args=with_paths(argv))
        cli.trainer.predict(cli.model, datamodule=cli.datamodule, return_predictions=False)
    except (RunError, FileNotFoundError, ValueError) as error:
        if os.environ.get("CLIP_SURGERY_TRACEBACK"):
            raise
        print(f"lightning predict: {error}", file=sys.stderr)
        return 1
    if cli.trainer.is_global_zero and cli.writer.report:
        print_report(cli.writer.output, cli.writer.report)
    return 0


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
        self.writer.config = self.parser.dump(self.config, skip_none=False)
        if self.config.trainer.enable_progress_bar is not False:
            theirs = self._get(self.config_init, "trainer").get("callbacks") or []
            kwargs["callbacks"] = [
                *(theirs if isinstance(theirs, list) else [theirs]),
                ImageProgress(),
            ]
        return super().instantiate_trainer(**kwargs)
