"""What ``lightning predict --help`` says: a screen, and fields by topic."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from textwrap import fill
from typing import TYPE_CHECKING

from common.nearest import did_you_mean
from datamodules import DATASETS
from tasks import TASKS
from tasks._configs import InvalidConfig

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

USAGE = (
    "lightning predict --config NAME [--model TASK] [--data DATASET] [--SECTION.FIELD VALUE ...]"
)

SECTIONS = ("model", "data", "writer", "trainer")
"""Sections of a config; the fields of each are a topic, as are those of each task and data set."""

OFTEN = {
    "--model.backbone.model NAME": "which CLIP (`lightning list models`)",
    "--model.backbone.pretrained TAG": "its weights: a tag, a file, or null",
    "--model.backbone.attention NAME": "how it is read (`lightning list recipes`)",
    "--data.shards PLACE": "folder, pattern or URL of the shards",
    "--data.batch_size N": "images at once",
    "--data.num_workers N": "processes that load them",
    "--writer.output DIR": "folder of the run, or s3://bucket/run",
    "--writer.overlays true": "heat maps, too",
    "--writer.overwrite true": "start anew",
    "--trainer.accelerator NAME": "cpu, gpu, mps; by default what there is",
    "--trainer.devices N": "how many of them",
    "--trainer.precision NAME": "bf16-mixed is faster where the device has it",
}
"""The fields that most runs set: what `overview` shows."""


def help_asked(words: Sequence[str]) -> tuple[str | None, list[str]]:
    """What help a command line asks for, and its other words.

    Returns:
        None: none. Empty: that of what it has chosen already. Else a topic: ``--help TOPIC``.
    """
    for i, word in enumerate(words):
        option, equals, topic = word.partition("=")
        if option in ("-h", "--help"):
            rest = [*words[:i], *words[i + 1 :]]
            if not equals and rest[i:] and not rest[i].startswith("-"):
                topic = rest.pop(i)
            return topic, rest
    return None, list(words)


def overview() -> str:
    """Usage, choices, and the fields that most runs set."""

    def listed(title: str, names: Sequence[str]) -> str:
        return fill(f"{title:<12}{', '.join(sorted(names))}", 96, subsequent_indent=" " * 12)

    often = "\n".join(f"  {field:<36}{text}" for field, text in OFTEN.items())
    return f"""usage: {USAGE}

Run a task over shards: masks, scores and metrics in a run's folder. The same command again goes on
with a run that was stopped.

  lightning predict --config demo.yaml
  lightning predict --config vit_b16_voc.yaml --data.shards shards/voc
  lightning predict --model Explainability --data Images --data.path photos/ --data.names "[cat, dog]"

  -c, --config NAME   a packaged config (`lightning list configs`) or a file; of several, later ones win
  --model TASK        `lightning list tasks` says what each answers
  --data DATASET      `lightning list datasets` lists their classes
  --print_config      print what would run, and exit
  -h, --help TOPIC    all fields of a TASK or a DATASET; or of {", ".join(SECTIONS)}; or all

{listed("tasks:", list(TASKS.values()))}
{listed("data sets:", list(DATASETS.values()))}

fields that most runs set (they win over the config):
{often}
"""


def about(topic: str) -> tuple[dict[str, str], tuple[str, ...]]:
    """What a topic is about.

    Returns:
        Section -> class that it chooses, and the sections to be shown.

    Raises:
        InvalidConfig: no such topic; says which is near.
    """
    classes = dict.fromkeys(TASKS.values(), "model") | dict.fromkeys(DATASETS.values(), "data")
    known = {name.lower(): name for name in (*classes, *SECTIONS, "all")}
    name = known.get(topic.lower(), "")
    if not name:
        hint = did_you_mean(topic, known.values()) or f". Topics: {', '.join(known.values())}"
        raise InvalidConfig(f"--help: no topic {topic!r}{hint}")
    if name in classes:
        return {classes[name]: name}, (classes[name],)
    return {}, SECTIONS if name == "all" else (name,)


def print_fields(parser: ArgumentParser, sections: Sequence[str]) -> None:
    """Print the fields of some sections, without what is said in `overview`."""
    for group in parser._action_groups:
        for action in group._group_actions:
            head = action.dest.partition(".")[0]
            parts = action.dest.endswith(".help") or "." not in action.dest
            whole = action.help == "Path to a configuration file."
            if head not in sections or parts or whole:
                action.help = argparse.SUPPRESS
        if all(action.help == argparse.SUPPRESS for action in group._group_actions):
            group.description = group.title = None
    others = [name for name in SECTIONS if name not in sections]
    parser.description = None
    parser.epilog = "More: --help TASK, --help DATASET" + "".join(f", --help {s}" for s in others)
    parser.print_help()
