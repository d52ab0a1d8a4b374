"""From configs and words of a command line to a task, a DataModule, a writer and a Trainer."""

from __future__ import annotations

import argparse
import inspect
import re
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from common.errors import InvalidSetting, UserError
from datamodules import DATASETS, ShardDataModule
from datamodules._remote import without_query
from tasks import TASKS
from tasks._configs import (
    InvalidConfig,
    Layer,
    find_class,
    find_part,
    fold,
    import_class,
    leaves,
    parse_yaml,
    read_layers,
)
from tasks._help import USAGE, about, print_fields
from tasks._messages import in_a_line, no_field
from tasks._progress import ImageProgress
from tasks._protocols import with_protocol
from tasks._ranks import Ranks, environment
from tasks._task import Task
from tasks.run import Run, RunError
from tasks.run.callback import ResultWriter
from tasks.run.processes import told_of_gathering

BASES: dict[str, type] = {"model": Task, "data": ShardDataModule}
"""Section -> the class that all of its classes descend from."""

_DEFAULTS = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_model_summary": False,
    "use_distributed_sampler": False,
}


# What a config can't say otherwise, such as the default of a callback's argument.
yaml.SafeDumper.add_multi_representer(Enum, lambda dumper, e: dumper.represent_data(e.value))


class Predict(LightningCLI):
    """All objects of a run, made from its settings.

    The task and the DataModule are chosen first; the parser then knows their fields, as it knows the
    Trainer's.

    Args:
        layers: what configs set; later ones win.
        words: fields on a command line (``--data.batch_size 4``); they win over all layers.
        ranks: starts the processes of further devices; Lightning does without.
        topic: print the fields of this topic and exit, see `tasks._help`; of an empty one, those of
            the classes that are chosen.
    """

    writer: ResultWriter

    def __init__(
        self,
        layers: Sequence[Layer],
        words: Sequence[str] = (),
        ranks: Ranks | None = None,
        topic: str | None = None,
    ) -> None:
        self.ranks = ranks
        self.shown: Sequence[str] = ()
        wants_help = topic is not None
        if topic:
            choice, self.shown = about(topic)
            classes = {section: find_class(section, name) for section, name in choice.items()}
            layers = [*layers, Layer("--help", {}, classes)]
        elif wants_help:
            self.shown = [s for s in BASES if any(s in layer.classes for layer in layers)]
            self.shown = [*self.shown, "writer"]
        self.layers = layers
        self.classes: dict[str, type] = {}
        for section, base in BASES.items():
            named = [layer for layer in layers if section in layer.classes]
            if named:
                path = named[-1].classes[section]
                self.classes[section] = import_class(section, path, named[-1].folder)
            elif wants_help:
                self.classes[section] = base
            else:
                raise InvalidConfig(_nothing_chosen(section, layers))
        self.layers = with_protocol(layers, words, self.classes)
        super().__init__(
            self.classes["model"],
            self.classes["data"],
            subclass_mode_model=False,
            subclass_mode_data=False,
            save_config_callback=None,
            seed_everything_default=False,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            parser_kwargs={
                "prog": "lightning predict",
                "usage": USAGE,
                "exit_on_error": False,
                "allow_abbrev": False,
            },
            trainer_defaults=_DEFAULTS,
            args=list(words),
            run=False,
        )

    def predict(self) -> Run:
        """Process all shards that are not finished; results are in the run's folder."""
        # Else float32 has ten bits there, and only there: products of matrices have all of theirs.
        torch.backends.cudnn.allow_tf32 = False
        with told_of_gathering(self.trainer):
            self.trainer.predict(self.model, datamodule=self.datamodule, return_predictions=False)
        return self.writer.run

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """A parser that dumps the chosen classes beside their fields."""
        self.parser_class = type("Parser", (_Parser,), {"classes": self.classes})
        return super().init_parser(**kwargs)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the writer's fields."""
        parser.add_lightning_class_args(ResultWriter, "writer")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Merge the layers, check their fields, and let the words win.

        Raises:
            InvalidConfig: a field doesn't exist or has a wrong value; names its source.
        """
        if self.shown:
            print_fields(parser, self.shown)
            parser.exit()
        fields = {action.dest for action in parser._actions}
        # Beside a field that takes a class there is FIELD.help; sections are no fields of their own.
        fields = {name for name in fields if not name.endswith(".help")}
        known = {f for f in fields if not any(other.startswith(f"{f}.") for other in fields)}
        origin: dict[str, str] = {}
        settings: dict[str, Any] = {}
        for layer in self.layers:
            for key, value in leaves(layer.fields, known):
                if self._of_another_class(layer, key):
                    continue
                if key not in known:
                    raise InvalidConfig(f"{layer.source}: {no_field(key, known)}")
                origin[key] = f"{layer.source}: {key}"
                settings = _put(settings, key, value)
        try:
            config = yaml.safe_dump(settings, allow_unicode=True)
            self.config = parser.parse_args([f"--config={config}", *args] if settings else args)
        except argparse.ArgumentError as error:
            given = {word.partition("=")[0].lstrip("-") for word in args}
            words = {key: source for key, source in origin.items() if key not in given}
            raise InvalidConfig(in_a_line(str(error), known, words)) from None

    def _of_another_class(self, layer: Layer, key: str) -> bool:
        """Whether a layer sets a field of a class in whose place another was chosen.

        What all tasks, or all DataModules, have is no such field; one that only has the same name is:
        the threshold of a mask is not that of a point.
        """
        section, _, field = key.partition(".")
        if section not in self.classes or section not in layer.classes:
            return False
        if layer.classes[section].rpartition(".")[2] == self.classes[section].__name__:
            return False
        shared = inspect.signature(BASES[section]).parameters
        return field.partition(".")[0] not in shared

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """The Trainer, with the writer and a progress bar that counts images."""
        self.writer = self._get(self.config_init, "writer")
        self.writer.config = without_query(self.parser.dump(self.config, skip_unset=False))
        # Under SLURM, Lightning would load a checkpoint that a training left in this folder.
        if self.config.trainer.default_root_dir is None:
            kwargs["default_root_dir"] = str(self.writer.output)
        if not self.config.trainer.plugins:
            kwargs["plugins"] = [environment(self.ranks)]
        if self.config.trainer.enable_progress_bar is not False:
            theirs = self._get(self.config_init, "trainer").get("callbacks") or []
            kwargs["callbacks"] = [
                *(theirs if isinstance(theirs, list) else [theirs]),
                ImageProgress(),
            ]
        try:
            return super().instantiate_trainer(**kwargs)
        except UserError:
            raise
        except (
            MisconfigurationException,
            ValueError,
            TypeError,
            ImportError,
            RuntimeError,
        ) as error:
            # What Lightning's Trainer refuses are settings: no GPU, no such strategy, ...
            hint = ""
            if self.config.trainer.accelerator not in ("auto", "cpu"):
                hint = " (--trainer.accelerator auto takes what this machine has)"
            raise InvalidSetting(f"--trainer: {' '.join(str(error).split())}{hint}") from None


def predict(config: str | Path | Mapping[str, Any], **fields: Any) -> Run:
    """Run a task over shards, as ``lightning predict`` does; a run that was broken off goes on.

    Sets up no logging, handles no signals, prints nothing but the progress bar.

    Args:
        config: name of a packaged config (``vit_b16_voc``), path of a file, or its content as a mapping.
        fields: what to set otherwise: sections (``data={"shards": "shards/voc"}``,
            ``model="Recognition"``) or dotted names (``**{"data.batch_size": 4}``).

    Returns:
        The finished run.

    Raises:
        InvalidConfig: a config or a field that doesn't exist, or a wrong value.
        UserError: what else the command would tell in a sentence, such as missing weights.
        RunError: more samples or shards are missing than ``data.max_error_rate`` allows; the results
            of the others are in the folder.

    Example:
        >>> run = predict("demo", writer={"output": "runs/demo"})  # doctest: +SKIP
        >>> run.metrics["mIoU"]  # doctest: +SKIP
    """
    objects = Predict([*read_layers(config), layer_of(fields)])
    run = objects.predict()
    if objects.trainer.is_global_zero and (failure := objects.writer.tally.verdict()):
        raise RunError(failure)
    return run


class _Parser(LightningArgumentParser):
    classes: dict[str, type]

    def dump(self, *args: Any, **kwargs: Any) -> str:
        """The settings as a config: each class with its path, its fields below ``init_args``."""
        lines: list[str] = []
        inside = False
        for line in super().dump(*args, **kwargs).splitlines():
            if cls := self.classes.get(line.removesuffix(":")):
                inside = True
                lines += [line, f"  class_path: {path_of(cls)}", "  init_args:"]
            else:
                inside = inside and line.startswith(" ")
                lines.append(f"  {line}" if inside else line)
        return "".join(f"{line}\n" for line in lines)


def path_of(cls: type) -> str:
    """The path by which a config names a class."""
    for package, names in (("tasks", TASKS), ("datamodules", DATASETS)):
        if cls.__module__.startswith(f"{package}.") and cls.__name__ in names.values():
            return f"{package}.{cls.__name__}"
    return f"{cls.__module__}.{cls.__qualname__}"


def read_words(words: Sequence[str]) -> tuple[list[Layer], list[str]]:
    """The configs and classes that a command line names, as layers, and the words that are fields."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("-c", "--config", action="append", default=[])
    parser.add_argument("--model", "--model.class_path")
    parser.add_argument("--data", "--data.class_path")
    try:
        named, rest = parser.parse_known_args(list(words))
    except argparse.ArgumentError as error:
        raise InvalidConfig(f"{error.argument_name}: {error.message}") from None
    layers = [layer for config in named.config for layer in read_layers(config)]
    for section in ("model", "data"):
        value = getattr(named, section)
        if value is not None:
            if value.startswith("{"):
                value = parse_yaml(value, f"--{section}")
            cls, fields = fold(section, value, Path.cwd())
            classes = {section: cls} if cls else {}
            # A class of one's own lies beside the config, or is installed.
            folder = next((layer.folder for layer in reversed(layers) if layer.folder), None)
            layers.append(Layer(f"--{section}", {section: fields}, classes, folder))
    fields_of = re.compile(r"^--(model|data)\.init_args\.")
    rest = [fields_of.sub(r"--\1.", word) for word in rest]
    for i, word in enumerate(rest):
        option, equals, value = word.partition("=")
        if option == "--model.backbone" and (equals or i + 1 < len(rest)):
            part = find_part("backbones", value or rest[i + 1], Path.cwd())
            rest[i if equals else i + 1] = f"{option}={part}" if equals else str(part)
    return layers, rest


def layer_of(fields: Mapping[str, Any]) -> Layer:
    """Fields as keyword arguments name them: nested, or with dots (``**{"data.batch_size": 4}``)."""
    settings: dict[str, Any] = {}
    classes: dict[str, str] = {}
    for key, value in sorted(fields.items(), key=lambda item: item[0].count(".")):
        if key in ("model", "data"):
            cls, value = fold(key, value, Path.cwd())
            classes |= {key: cls} if cls else {}
        elif key == "model.backbone":
            value = fold("model", {"backbone": value}, Path.cwd())[1]["backbone"]
        settings = _put(settings, key, value)
    return Layer("fields", settings, classes)


def _put(settings: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """``settings`` with one more value, at a dotted key."""
    head, _, rest = key.partition(".")
    below = settings.get(head)
    return {
        **settings,
        head: _put(below if isinstance(below, dict) else {}, rest, value) if rest else value,
    }


def _nothing_chosen(section: str, layers: Sequence[Layer]) -> str:
    if not layers:
        return (
            "nothing to run: give --config NAME (`lightning list configs`), or --model TASK and "
            "--data DATASET. First run: lightning predict --config demo.yaml"
        )
    what, choices = {
        "model": ("task", TASKS),
        "data": ("data set", DATASETS),
    }[section]
    return f"no {what}: add --{section} with one of {', '.join(sorted(choices.values()))}"
