"""Protocols: all settings of a published evaluation but the method, by one name.

A protocol is a file of ``configs/protocols``: fields that hold for every data set it was run on
(``every``), those of each (``sets``), and where they are written down. A config or a command line names
one (``--model.protocol sclip``); here it becomes a layer of settings like any other.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from common.nearest import nearest
from tasks._configs import (
    FOLDER,
    OWN_SIZE,
    InvalidConfig,
    Layer,
    fit_sizes,
    names_of,
    parse_yaml,
    title,
)

if TYPE_CHECKING:
    from datamodules._datamodule import ShardDataModule

SETS: Mapping[tuple[str, bool], str] = {
    ("VOC", True): "voc21",
    ("VOC", False): "voc20",
    ("PascalContext", True): "context60",
    ("PascalContext", False): "context59",
    ("COCOObject", True): "coco_object",
    ("COCOStuff", False): "coco_stuff",
    ("Cityscapes", False): "cityscapes",
    ("ADE20K", False): "ade20k",
    ("Shapes", True): "voc21",
    ("Shapes", False): "voc20",
}
"""DataModule, and whether the background is a class -> what the field calls that.

The drawn world stands for VOC, in its own words and with sizes in proportion to what the network was
trained at.
"""

_DRAWN = "Shapes"
_SIDES = ("data.image_size", "model.tile", "model.window", "model.stride")


@dataclass(frozen=True)
class Protocol:
    """A published evaluation on one data set.

    Attributes:
        name: such as ``sclip``.
        dataset: such as ``voc21``.
        fields: dotted name -> value of everything that the evaluation fixes.
        source: repository, file and commit that say so.
        differs: what of the evaluation is otherwise here, in sentences.
        drawn: whether the drawn world stands for the data set.
    """

    name: str
    dataset: str
    fields: Mapping[str, Any]
    source: str
    differs: Sequence[str] = field(default_factory=tuple)
    drawn: bool = False

    def fitted(self, model: str | None) -> dict[str, Any]:
        """The fields, with sizes that fit a tower where images are squashed anyway."""
        from surgery.sources import input_sizes  # and with it torch

        fields = dict(self.fields)
        if self.drawn:
            fields["data.synonyms"] = "none"
            own = input_sizes(model)[0] if model else OWN_SIZE
            fields |= {n: fields[n] * own // OWN_SIZE for n in _SIDES if fields[n] is not None}
        found = nested(fields)
        if model and not self.drawn and fields["data.resize"] == "squash":
            fit_sizes(found, model)
        return found

    def departures(self, task: Any, datamodule: ShardDataModule) -> dict[str, dict[str, Any]]:
        """Fields that a run has otherwise: dotted name -> the protocol's value, and the run's."""
        found = {}
        for section, fields in self.fitted(task.config.model).items():
            run = task if section == "model" else datamodule
            for name, value in fields.items():
                if (has := _plain(getattr(run, name))) != value:
                    found[f"{section}.{name}"] = {"protocol": value, "run": has}
        return found

    def described(self, task: Any, datamodule: ShardDataModule) -> dict[str, Any]:
        """What ``run.json`` says of the protocol, its source, and what of a run is otherwise."""
        dataset = self.dataset
        return {
            "name": self.name,
            "dataset": f"{datamodule.info.name}, as {dataset}" if self.drawn else dataset,
            "source": self.source,
            "departs": self.departures(task, datamodule),
            "differs": list(self.differs),
        }


def list_protocols() -> list[tuple[str, str]]:
    """Names, and what each is."""
    rows = []
    for name in names_of("protocols"):
        path = FOLDER / "protocols" / f"{name}.yaml"
        read = _read(path)
        sets = f" ({', '.join(read['sets'])})" if "sets" in read else ""
        rows.append((name, f"{title(path)}{sets}"))
    return rows


def check_name(name: str) -> None:
    """Refuse the name of no protocol, and of one that can't be offered.

    Raises:
        InvalidConfig: says what is near, or why not.
    """
    known = names_of("protocols")
    if name not in known:
        near = nearest(name, known)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise InvalidConfig(f"--model.protocol: no {name!r}.{hint} Known: {', '.join(known)}")
    if reason := _read(FOLDER / "protocols" / f"{name}.yaml").get("refused"):
        raise InvalidConfig(f"--model.protocol {name} is not offered: {reason}")


def find_protocol(
    name: str, datamodule: type[ShardDataModule], background: bool | None
) -> Protocol:
    """A protocol on a data set.

    Args:
        name: of the protocol.
        datamodule: class of the data set.
        background: whether the background is a class of its own; None as usual for the data set.

    Raises:
        InvalidConfig: no such protocol, or it says nothing of the data set.
    """
    check_name(name)
    read = _read(FOLDER / "protocols" / f"{name}.yaml")
    if background is None:
        background = bool(datamodule.info.background_words)
    dataset, drawn = SETS.get((datamodule.__name__, background), ""), datamodule.__name__ == _DRAWN
    if dataset not in read["sets"]:
        words = " with a background" if background else " without a background"
        raise InvalidConfig(
            f"--model.protocol {name} says nothing of {datamodule.__name__}{words}: it is of "
            f"{', '.join(read['sets'])}"
        )
    own = dict(read["sets"][dataset])
    source = f"{read['repository']} {own.pop('file')} {read['commit']}"
    fields = {**read["every"], **own}
    return Protocol(name, dataset, fields, source, tuple(read.get("differs") or ()), drawn)


def with_protocol(
    layers: Sequence[Layer], words: Sequence[str], classes: Mapping[str, type]
) -> list[Layer]:
    """Layers with one more where a protocol is named: below what is said beside its name.

    So it wins over what configs said before, and loses to what stands beside its name or comes later.

    Args:
        layers: what configs set; later ones win.
        words: fields on a command line, which win over all.
        classes: the task ("model") and the data set ("data") that were chosen.

    Raises:
        InvalidConfig: no such protocol, or none for this data set.
    """
    options = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    options.add_argument("--model.protocol", dest="protocol")
    options.add_argument("--data.background", dest="background")
    options.add_argument("--model.backbone.model", dest="tower")
    given = vars(options.parse_known_args(list(words))[0])
    said = [layer.fields.get("model") or {} for layer in layers]
    places = [i for i, fields in enumerate(said) if "protocol" in fields]
    place = len(layers) if given["protocol"] else places[-1] if places else None
    if place is None or "protocol" not in signature(classes["model"]).parameters:
        return list(layers)
    from tasks._task import DEFAULT_BACKBONE  # and with it Lightning

    name = parse_yaml(given["protocol"], "") if given["protocol"] else said[place]["protocol"]
    if name is None:
        return list(layers)
    background: Any = None
    for layer in layers:
        background = (layer.fields.get("data") or {}).get("background", background)
    if given["background"]:
        background = parse_yaml(given["background"], "--data.background")
    protocol = find_protocol(str(name), classes["data"], background)
    tower = DEFAULT_BACKBONE.model
    for fields in said:
        tower = (fields.get("backbone") or {}).get("model", tower)
    tower = given["tower"] or tower
    layer = Layer(f"protocol {protocol.name}", protocol.fitted(tower))
    return [*layers[:place], layer, *layers[place:]]


def nested(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted names as mappings: section -> field -> value."""
    found: dict[str, Any] = {}
    for key, value in fields.items():
        section, _, name = key.partition(".")
        found.setdefault(section, {})[name] = value
    return found


@cache
def _read(path: Path) -> dict[str, Any]:
    read: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return read


def _plain(value: Any) -> Any:
    """As a config has it: lists, not tuples."""
    return list(value) if isinstance(value, tuple) else value
