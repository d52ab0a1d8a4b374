"""What is wrong with a command line or a config, in a sentence that names what is near."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping

from common.nearest import did_you_mean, nearest


def no_field(key: str, known: set[str], mark: str = "") -> str:
    """That a dotted field doesn't exist, and which was meant; ``mark`` stands before whole names."""
    parent, _, name = key.rpartition(".")
    above = f"{parent}." if parent else ""
    beside = {k.removeprefix(above).partition(".")[0] for k in known if k.startswith(above)}
    if near := nearest(name, beside, cutoff=0.6):
        return f"no field `{name}`; did you mean `{near[0]}`?"
    elsewhere = sorted(k for k in known if k.rpartition(".")[2] == name)
    elsewhere += nearest(key, known, cutoff=0.7)
    if elsewhere:
        return f"no field `{name}`; did you mean `{mark}{elsewhere[0]}`?"
    there = f"{parent} has {', '.join(sorted(beside))}" if parent and beside else "--help lists all"
    return f"no field `{name}`; {there}"


def in_a_line(message: str, known: set[str], origin: Mapping[str, str]) -> str:
    """What jsonargparse says at length, in a sentence.

    Args:
        message: jsonargparse's.
        known: all fields.
        origin: field -> what to call it, where a config set it.
    """
    if match := re.match(r"unrecognized arguments: (.*)", message, re.DOTALL):
        word = match[1].split()[0]
        if not word.startswith("--"):
            return f"{word!r} belongs to no option"
        option = word.partition("=")[0]
        return f"{option}: {no_field(option.removeprefix('--'), known, '--')}"
    if match := re.match(r"the following arguments are required: (.*)", message):
        return f"needed: {', '.join(f'--{key}' for key in match[1].split(', '))}"
    if match := re.match(r'(?:argument \S+: )?Parser key "([^"]+)":\s*', message):
        key, rest = match[1], message[match.end() :]
        name = origin.get(key, f"--{key}")
        types = re.search(r"Subtypes: \[(.*)\]", rest) or re.search(
            r"Expected an? (.*?)(?:\. Got value|$)", rest, re.MULTILINE
        )
        given = re.search(r"(?:Given value|Got value): (.*)", rest)
        inner = re.search(r"(Option '[^']+' is not accepted)", rest)
        if inner:
            return f"{name}: {inner[1]}"
        if given and (field := re.match(r"NestedArg\(key='([^']*)'", given[1])):
            return (
                f"--{key}.{field[1]}: --{key} has no fields until it names a class (--{key} CLASS)"
            )
        if within := re.search(r"Problem with given class_path '[\w.]*?(\w+)':\s*(.*)", rest):
            needed = re.match(r"the following arguments are required: (.*)", within[2])
            fields = needed and ", ".join(f"--{key}.{field}" for field in needed[1].split(", "))
            return f"{name}={within[1]}: {f'needed: {fields}' if fields else within[2]}"
        if types and given:
            hint = did_you_mean(given[1], _valid(message))
            return f"{name}: expected {_types(types[1])}, got {given[1]!r}{hint}"
        return f"{name}: {' '.join(rest.split())}"
    return " ".join(message.removeprefix("argument ").split())


def _valid(message: str) -> list[str]:
    """The values that jsonargparse's message says there are: of a choice, or names of classes."""
    choices = ", ".join(re.findall(r"Literal\[([^\]]*)\]", message))
    bases = re.findall(r"<class '(\w+(?:\.\w+)*)\.([A-Z]\w+)'>", message)
    classes = [
        name for module, base in bases for name in _subclasses(getattr(sys.modules[module], base))
    ]
    return [*re.findall(r"'([^']*)'", choices), *classes]


def _subclasses(cls: type) -> list[str]:
    """Names of the classes that derive from one, as far as they are imported."""
    derived: list[type] = cls.__subclasses__()
    return [name for sub in derived for name in (sub.__name__, *_subclasses(sub))]


def _types(text: str) -> str:
    """Types as Python shows them, in words."""
    text = re.sub(r"<class '([^']*)'>", r"\1", text).replace("NoneType", "null")
    text = re.sub(r"\b(?:[a-z_]+\.)+(?=[A-Za-z])", "", text)  # modules
    text = re.sub(r"Literal\[([^\]]*)\]", r"\1", text)
    types = re.split(r", (?![^\[]*\])", text)
    return " or ".join(dict.fromkeys(types))
