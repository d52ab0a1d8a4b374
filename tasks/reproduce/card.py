"""A card: what a reproduction found, and on what, in one small file that can be sent and read back."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

from common.errors import UserError
from tasks.reproduce.plan import Cell, Plan
from tasks.run import Run
from tasks.run.identity import flatten

FORMAT = 1
_NAMED = ("row", "setting", "backbone", "data", "metric")
_RUN: dict[str, type] = {
    "settings": dict,
    "weights": str,
    "data": dict,
    "versions": dict,
    "device": dict,
}


def make_card(
    plan: Plan, demo: bool, ours: Mapping[Cell, float], runs: Mapping[Cell, str], folder: Path
) -> dict[str, Any]:
    """What is known of a table's numbers, without paths or names of this machine.

    Args:
        plan: of the table.
        demo: whether they are of the demo world.
        ours: cell -> number.
        runs: cell -> name of the run that gave it.
        folder: with the runs.

    Returns:
        A mapping that JSON can hold.
    """
    return {
        "format": FORMAT,
        "name": plan.name,
        "demo": demo,
        "cells": [
            {**{name: getattr(cell, name) for name in _NAMED}, "ours": ours[cell], "run": run}
            for cell, run in runs.items()
        ],
        "runs": {name: _of_run(Run.load(folder / name)) for name in dict.fromkeys(runs.values())},
    }


def _of_run(run: Run) -> dict[str, Any]:
    described, summary = run.described, run.summary
    shards = [
        (name, about.get("bytes"), about.get("sha256") or about.get("glance"))
        for name, about in sorted(described.get("contents", {}).items())
    ]
    settings = {
        key: PurePath(value).name
        if isinstance(value, str) and PurePath(value).is_absolute()
        else value
        for key, value in flatten(run.settings).items()
        if key not in ("data.shards", "weights")
    }
    return {
        "settings": settings,
        "weights": run.settings["weights"],
        "data": {
            "name": run.info.name,
            "images": summary["images"],
            "errors": summary["errors"],
            "shards": len(shards),
            "digest": hashlib.sha256(json.dumps(shards).encode()).hexdigest(),
        },
        "versions": described.get("versions", {}),
        "device": described.get("device", {}),
        "jobs": run.jobs,
    }


def read_card(path: Path, plans: Mapping[str, Plan]) -> tuple[Plan, bool, dict[Cell, float]]:
    """Read a card back, and check it.

    Args:
        path: of the file.
        plans: name -> table or figure.

    Returns:
        What it is a card of, whether of the demo world, and its numbers.

    Raises:
        UserError: it is no card, or says what can't be; names the file and the place.
    """
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: can't be read as a card ({error})") from None
    try:
        if card["format"] != FORMAT:
            raise UserError(f"{path}: a card of format {card['format']!r}; known is {FORMAT}")
        plan, demo = plans[card["name"]], bool(card["demo"])
        known = {_name(vars(c)): c for c in (plan.demo_cells() if demo else plan.cells())}
        for name, run in card["runs"].items():
            for key, kind in _RUN.items():
                if not isinstance(run[key], kind) or not run[key]:
                    raise UserError(f"{path}: {key} of run {name} is missing or no {kind.__name__}")
            if len(run["weights"]) != 64 or len(run["data"]["digest"]) != 64:
                raise UserError(f"{path}: run {name} lacks the digest of its weights or data")
        ours = {}
        for given in card["cells"]:
            named = _name(given)
            if named not in known:
                raise UserError(f"{path}: {plan.name} has no cell {' / '.join(named)}")
            if given["run"] not in card["runs"]:
                raise UserError(f"{path}: {' / '.join(named)} is of run {given['run']}, not there")
            value = given["ours"]
            if not isinstance(value, int | float) or not -1 <= value <= 1:
                raise UserError(f"{path}: {' / '.join(named)}: {value!r} is no fraction")
            ours[known[named]] = float(value)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: no card of `lightning reproduce` (at {error})") from None
    return plan, demo, ours


def _name(cell: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(str(cell[name]) for name in _NAMED)
