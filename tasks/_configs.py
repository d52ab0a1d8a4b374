"""Configs: files, the parts that they are composed of, and the classes that they name.

A config that is run is `BACKBONE_EXPERIMENT`: one file of ``configs/backbones`` and one of
``configs/experiments``, composed by rule. A config of one's own may name the same two (``backbone:``,
``experiment:``) and say more.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml

import configs
from common.errors import InvalidSetting
from common.nearest import nearest
from datamodules import DATASETS
from tasks import TASKS

FOLDER = Path(configs.__file__).parent
CLASSES = {
    "model": {cls: f"tasks.{cls}" for cls in TASKS.values()},
    "data": {cls: f"datamodules.{cls}" for cls in DATASETS.values()},
}
"""Section of a config -> class name -> class path."""
SHORT = {"voc": "voc_explainability", "pascal_context": "pascal_context_segmentation"}
"""Names from before a data set had several tasks -> the experiments they stand for."""
OWN_SIZE = 224
_WHAT = {"model": "task", "data": "data set"}


class InvalidConfig(InvalidSetting):
    """A command line or a config can't be understood."""


@dataclass(frozen=True)
class Layer:
    """What one source (a config, the command line) sets; later layers win.

    Attributes:
        source: what it is called in messages.
        fields: section (model, data, trainer, writer) -> field -> value.
        classes: section (model, data) -> class path.
        folder: where modules that its class paths name may lie.
    """

    source: str
    fields: dict[str, Any]
    classes: dict[str, str] = field(default_factory=dict)
    folder: Path | None = None


def names_of(kind: str) -> list[str]:
    """Names of the packaged parts of a kind: "backbones" or "experiments"."""
    return sorted(path.stem for path in (FOLDER / kind).glob("*.yaml"))


def all_names() -> dict[str, str]:
    """All packaged configs: name -> what it is. Those in one file, then all that can be composed."""
    found = {path.stem: title(path) for path in sorted(FOLDER.glob("*.yaml"))}
    towers = {name: title(FOLDER / "backbones" / f"{name}.yaml") for name in names_of("backbones")}
    works = {
        name: title(FOLDER / "experiments" / f"{name}.yaml") for name in names_of("experiments")
    }
    works |= {short: works[name] for short, name in SHORT.items()}
    for backbone, tower in towers.items():
        for experiment, work in sorted(works.items()):
            found[f"{backbone}_{experiment}"] = f"{work}, {tower}"
    return found


def title(path: Path) -> str:
    """The first comment of a file."""
    return path.read_text(encoding="utf-8").split("\n", 1)[0].lstrip("# ")


def read_layers(config: str | Path | Mapping[str, Any]) -> list[Layer]:
    """The layers of a config: a file, the name of a packaged one, or settings.

    Args:
        config: path of a YAML or JSON file; a packaged name, with or without ``.yaml``; or the
            content of such a file.

    Raises:
        InvalidConfig: there is none, or it can't be read; says what is near.
    """
    if isinstance(config, Mapping):
        return _layers("config", dict(config), Path.cwd())
    path = Path(config)
    if path.is_file():
        return _layers(str(config), read_yaml(path), path.parent)
    name = str(config).removesuffix(".yaml").removesuffix(".yml")
    path = FOLDER / f"{name}.yaml"
    if path.is_file() and path.parent == FOLDER:
        return _layers(name, read_yaml(path), FOLDER)
    if parts := split_name(name):
        return compose(*parts, f"runs/{name}")
    near = nearest(Path(name).name, all_names(), 4, 0.4)
    hint = f". Did you mean {' or '.join(near)}?" if near else "."
    raise InvalidConfig(
        f"no config {str(config)!r}, neither as a file in {os.getcwd()} nor in the package{hint} "
        "`lightning list configs` lists all"
    )


def split_name(name: str) -> tuple[Path, Path] | None:
    """Files of the backbone and the experiment of BACKBONE_EXPERIMENT; None where it is no such name."""
    for backbone in names_of("backbones"):
        experiment = name.removeprefix(f"{backbone}_")
        path = FOLDER / "experiments" / f"{SHORT.get(experiment, experiment)}.yaml"
        if experiment != name and path.is_file():
            return FOLDER / "backbones" / f"{backbone}.yaml", path
    return None


def compose(backbone: Path | None, experiment: Path | None, output: str | None) -> list[Layer]:
    """An experiment, with sizes that fit a backbone, and the backbone; either may be None."""
    found = []
    tower = read_yaml(backbone) if backbone else {}
    if experiment:
        settings = read_yaml(experiment)
        if settings.keys() & {"backbone", "experiment"}:
            raise InvalidConfig(f"{experiment}: an experiment can't be composed of others")
        found = _layers(str(experiment), settings, experiment.parent)
        if backbone:
            fit_sizes(found[0].fields, tower.get("model"))
    if backbone:
        fields: dict[str, Any] = {"model": {"backbone": tower}}
        found.append(Layer(str(backbone), fields))
    if output:
        found.append(Layer("", {"writer": {"output": output}}))
    return found


def fit_sizes(fields: dict[str, Any], model: Any) -> None:
    """Make the sizes of an experiment those of a tower.

    They are written for ViT-B/16: 224, the size that it was trained at, becomes the tower's own, others
    are rounded up to whole patches; an image of so many tiles stays one.
    """
    if not isinstance(model, str):
        return
    from surgery.sources import input_sizes

    own, patch = input_sizes(model)
    task, data = fields.get("model", {}), fields.get("data", {})
    tile, size = task.get("tile"), data.get("image_size")

    def fit(side: int) -> int:
        return own if side == OWN_SIZE else -(-side // patch) * patch

    def fit_image(side: int) -> int:
        return side // tile * fit(tile) if tile and side % tile == 0 else fit(side)

    if tile:
        task["tile"] = fit(tile)
    if isinstance(size, int):
        data["image_size"] = fit_image(size)
    elif isinstance(size, list):
        data["image_size"] = [fit_image(side) for side in size]


def find_part(kind: str, name: str, folder: Path) -> Path:
    """File of a part, by its name or path: relative to ``folder``, else in the package.

    Args:
        kind: "backbones", "experiments", or "" for a file that is no part.
        name: such as ``vit_b16``, ``vit_b16.yaml`` or ``backbones/vit_b16.yaml``.
        folder: of the config that names it.

    Raises:
        InvalidConfig: there is none.
    """
    short = SHORT.get(name, name) if kind == "experiments" else name
    for place in (folder, folder / kind, FOLDER, FOLDER / kind):
        for candidate in (place / name, place / f"{short}.yaml"):
            if candidate.is_file():
                return candidate
    known = names_of(kind) if kind else []
    near = nearest(name, known)
    hint = f"; did you mean {near[0]}?" if near else f". Known: {', '.join(known)}" if known else ""
    what = kind.removesuffix("s") or "file"
    raise InvalidConfig(
        f"no {what} {name!r}, neither in {folder.resolve()} nor in the package{hint}"
    )


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML or JSON file.

    Raises:
        InvalidConfig: the file, and the line that is wrong.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidConfig(f"{path}: can't be read ({error})") from None
    found = parse_yaml(text, str(path))
    if not isinstance(found, dict):
        raise InvalidConfig(f"{path}: settings expected (`model: ...`), not {_shown(found)}")
    return found


def parse_yaml(text: str, source: str) -> Any:
    """The value of a YAML text."""
    from jsonargparse import get_loader  # numbers as on the command line: 1e-3 is one

    try:
        return get_loader("yaml")(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise InvalidConfig(f"{source}{line}: not YAML ({reason})") from None


def _layers(source: str, settings: dict[str, Any], folder: Path) -> list[Layer]:
    """The layers of a config's content."""
    settings = dict(settings)
    try:
        backbone, experiment = (
            find_part(f"{kind}s", str(settings.pop(kind)), folder) if settings.get(kind) else None
            for kind in ("backbone", "experiment")
        )
        both = f"runs/{backbone.stem}_{experiment.stem}" if backbone and experiment else None
        below = compose(backbone, experiment, both)
        fields: dict[str, Any] = {}
        classes: dict[str, str] = {}
        for section, value in settings.items():
            if section in CLASSES:
                cls, fields[section] = fold(section, value, folder)
                classes |= {section: cls} if cls else {}
            else:
                fields[section] = _read(value, folder)
    except InvalidConfig as error:
        if str(error).startswith(source):
            raise
        raise InvalidConfig(f"{source}: {error}") from None
    return [*below, Layer(source, fields, classes, folder)]


def fold(section: str, value: Any, folder: Path) -> tuple[str | None, dict[str, Any]]:
    """Class path and fields of what stands for a task (``section`` "model") or data set ("data").

    Args:
        section: "model" or "data".
        value: a class's name or path, a YAML file, or a mapping: of ``class_path`` and
            ``init_args``, or of fields alone.
        folder: what files are relative to.
    """
    value = _read(value, folder)
    if isinstance(value, str):
        return find_class(section, value), {}
    if value is None:
        return None, {}
    if not isinstance(value, dict):
        raise InvalidConfig(f"{section}: a class name or settings expected, not {_shown(value)}")
    cls = value.get("class_path")
    if cls is None and "init_args" not in value:
        fields = value
    elif odd := value.keys() - {"class_path", "init_args", "dict_kwargs"}:
        raise InvalidConfig(
            f"{section}: no field `{min(odd)}` beside `class_path`; fields belong below `init_args`"
        )
    else:
        fields = {**(value.get("init_args") or {}), **(value.get("dict_kwargs") or {})}
    if isinstance(fields.get("backbone"), str):
        fields = {
            **fields,
            "backbone": read_yaml(find_part("backbones", fields["backbone"], folder)),
        }
    return None if cls is None else find_class(section, str(cls)), dict(fields)


def _read(value: Any, folder: Path) -> Any:
    """The content of a YAML file that stands for a section, or the value itself."""
    if isinstance(value, str) and value.endswith((".yaml", ".yml")):
        return read_yaml(find_part("", value, folder))
    return value


def _shown(value: Any) -> str:
    return "nothing" if value is None else f"{value!r:.60}"


def find_class(section: str, name: str) -> str:
    """Class path of a task (section "model") or DataModule ("data") that is known by its name.

    Raises:
        InvalidConfig: no such class; lists the nearest names and all others.
    """
    known = CLASSES[section]
    if name in known or "." in name:
        return known.get(name, name)
    near = nearest(name, known, 2, 0.6)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    raise InvalidConfig(
        f"--{section}: no {_WHAT[section]} {name!r}.{hint} Known: {', '.join(sorted(known))}"
    )


def import_class(section: str, path: str, folder: Path | None) -> type:
    """Import the class that a config names; a module beside the config is found, too.

    Args:
        section: "model" or "data".
        path: ``module.Class``.
        folder: of the config; None leaves what is installed.

    Raises:
        InvalidConfig: no such module or class, or not of the kind that the section needs.
    """
    module, _, name = path.rpartition(".")
    top = module.partition(".")[0]
    beside = [] if folder is None else [folder / f"{top}.py", folder / top / "__init__.py"]
    own = any(file.is_file() for file in beside)
    if own and folder is not None and str(folder.resolve()) not in sys.path:
        sys.path.append(str(folder.resolve()))  # at the end: it may not hide what is installed
    try:
        found = import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # one that the module itself imports
        raise InvalidConfig(
            f"{section}: no module {error.name!r} for {path}. It is looked for beside the config "
            "that names it, and among what is installed"
        ) from None
    file = getattr(found, "__file__", None) or ""
    if own and folder is not None and not Path(file).is_relative_to(folder.resolve()):
        raise InvalidConfig(
            f"{section}: {top} beside the config has the name of a module that is installed "
            f"({file}): rename it"
        )
    cls = getattr(found, name, None)
    if cls is None:
        near = nearest(name, getattr(found, "__all__", dir(found)), cutoff=0.6)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise InvalidConfig(f"{section}: {module} has no {name}{hint}")
    base = getattr(
        import_module({"model": "tasks", "data": "datamodules"}[section]), _BASES[section]
    )
    if not (isinstance(cls, type) and issubclass(cls, base)):
        raise InvalidConfig(
            f"{section}: {path} is no {_WHAT[section]}: those derive from {base.__module__}."
            f"{base.__name__}"
        )
    return cls


_BASES = {"model": "Task", "data": "ShardDataModule"}


def leaves(
    fields: Mapping[str, Any], known: set[str], above: str = ""
) -> Iterator[tuple[str, Any]]:
    """Dotted name and value of every field; mappings below a known field are its value."""
    for name, value in fields.items():
        key = f"{above}{name}"
        if isinstance(value, Mapping) and key not in known:
            yield from leaves(value, known, f"{key}.")
        else:
            yield key, value
