"""Configs: each is complete, and the overview of them leaves none out."""

import re
from pathlib import Path

import configs
from datamodules import DATASETS
from tasks import TASKS
from tasks._configs import packaged

FOLDER = Path(configs.__file__).parent
BACKBONES = sorted(
    path.stem for path in (FOLDER / "backbones").glob("*.yaml") if path.stem != "demo"
)


def test_every_config_names_what_exists():
    for path in (*packaged(), *FOLDER.glob("datasets/*.yaml")):
        text = path.read_text()
        assert text.startswith("# "), path
        for part in re.findall(r"\S+/\w+\.yaml", text):
            assert (FOLDER / part).exists(), (path, part)
        for name in re.findall(r"class_path: (\w+)", text):
            assert name in {*TASKS.values(), *DATASETS.values()}, (path, name)


def test_the_overview_lists_every_config():
    listed = set()
    for name in re.findall(r"`(\w+\.yaml)`", (FOLDER / "README.md").read_text()):
        listed |= {name.replace("BACKBONE", backbone) for backbone in BACKBONES}
    names = {path.name for path in packaged()}
    assert {n for n in listed if n.startswith(tuple(BACKBONES))} <= names
    assert {n for n in names if n.startswith(tuple(BACKBONES))} <= listed
