"""Configs: composed by rule, complete, and the overview of them leaves none out."""

import hashlib
import json
import re
from pathlib import Path

import pytest
import yaml

from tasks.__main__ import main
from tasks._configs import FOLDER, SHORT, all_names, leaves, names_of, read_layers

BEFORE = json.loads((Path(__file__).parent / "configs_before.json").read_text())
"""Name -> digest of the settings that it gave when each config was a file of its own."""

FILES = [FOLDER / f"{name}.yaml" for name in ("demo", "demo_opinions", "images")]
PARTS = [*FOLDER.glob("backbones/*.yaml"), *FOLDER.glob("experiments/*.yaml")]


def settings_of(name) -> dict:
    """All that a config sets: dotted name -> value."""
    found = {}
    for layer in read_layers(name):
        found |= dict(leaves(layer.fields, set()))
        found |= {f"{s}.class_path": c.split(".")[-1] for s, c in layer.classes.items()}
    return found


def shown(capsys, *words) -> dict:
    """What ``--print_config`` prints."""
    with pytest.raises(SystemExit) as stop:
        main(["predict", *map(str, words), "--print_config"])
    assert stop.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


@pytest.mark.parametrize("name", BEFORE)
def test_every_name_that_was_a_file_gives_the_same_settings(name):
    text = json.dumps(settings_of(f"{name}.yaml"), sort_keys=True)
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == BEFORE[name], text


def test_a_field_of_another_class_is_not_taken_for_one_of_the_same_name(capsys):
    """The demo's threshold is that of Explainability's masks."""
    found = shown(capsys, "--config=demo.yaml", "--model=Interactive")["model"]["init_args"]
    assert found["threshold"] == 0.8
    assert found["backbone"]["model"] == "demo"
    own = shown(capsys, "--config=demo.yaml")["model"]["init_args"]
    assert own["threshold"] == 0.8125


def test_every_backbone_goes_with_every_experiment():
    names = set(all_names())
    for backbone in names_of("backbones"):
        for experiment in (*names_of("experiments"), *SHORT):
            assert f"{backbone}_{experiment}" in names
            settings = settings_of(f"{backbone}_{experiment}")
            assert settings["writer.output"] == f"runs/{backbone}_{experiment}"


@pytest.mark.parametrize(
    ("name", "size", "tile"),
    [
        ("vit_l14_336_voc", 336, None),
        ("vit_l14_336_voc20", 518, None),
        ("vit_l14_336_cityscapes", [1036, 2072], 518),
        ("rn50x4_nus_wide", 288, None),
        ("rn50x16_coco_stuff", 512, None),
        ("vit_b32_cityscapes", [1024, 2048], 512),
    ],
)
def test_sizes_fit_the_tower(name, size, tile):
    settings = settings_of(name)
    assert settings["data.image_size"] == size
    assert settings.get("model.tile") == tile


def test_a_new_combination_prints_as_a_whole(capsys):
    found = shown(capsys, "--config", "rn50x64_voc_interactive_512.yaml")
    assert found["model"]["class_path"] == "tasks.Interactive"
    assert found["model"]["init_args"]["backbone"]["model"] == "RN50x64"
    assert found["data"]["init_args"]["image_size"] == 512
    assert found["trainer"]["accelerator"] == "auto"


@pytest.mark.parametrize("path", [*FILES, *PARTS], ids=lambda p: p.name)
def test_every_packaged_file_says_what_it_is(path):
    assert re.match(r"# [A-Z]", path.read_text())


@pytest.mark.parametrize("path", [*FILES, *FOLDER.glob("experiments/*.yaml")], ids=lambda p: p.name)
def test_a_copy_of_a_packaged_file_works_anywhere(path, tmp_path):
    copy = tmp_path / "mine" / "copy.yaml"
    copy.parent.mkdir()
    copy.write_text(path.read_text())
    assert settings_of(copy)["data.class_path"]


def test_a_config_of_ones_own_names_parts_and_says_more(tmp_path, capsys):
    path = tmp_path / "own.yaml"
    path.write_text(
        "backbone: vit_l14\nexperiment: pascal_context\nmodel: {init_args: {window: 336}}\n"
        "data:\n  init_args:\n    batch_size: 2\n"
    )
    found = shown(capsys, "--config", path)
    assert found["model"]["init_args"]["backbone"]["model"] == "ViT-L-14"
    assert found["model"]["init_args"]["window"] == 336
    assert found["data"]["init_args"]["image_size"] == 518
    assert found["data"]["init_args"]["batch_size"] == 2


def test_parts_beside_a_config_come_before_the_packaged_ones(tmp_path):
    (tmp_path / "backbones").mkdir()
    (tmp_path / "backbones" / "vit_b16.yaml").write_text("model: ViT-B-16\npretrained: null\n")
    path = tmp_path / "own.yaml"
    for name in ("vit_b16", "vit_b16.yaml", "backbones/vit_b16.yaml"):
        path.write_text(f"model:\n  init_args:\n    backbone: {name}\n")
        assert settings_of(path)["model.backbone.pretrained"] is None
    path.write_text("model:\n  init_args:\n    backbone: backbones/rn50.yaml\n")
    assert settings_of(path)["model.backbone.model"] == "RN50"


def test_a_backbone_is_named_on_the_command_line(capsys):
    words = ["--config", "demo", "--model.backbone", "vit_l14", "--model.backbone.blocks", "3"]
    found = shown(capsys, *words)["model"]["init_args"]["backbone"]
    assert (found["model"], found["pretrained"], found["blocks"]) == ("ViT-L-14", "openai", 3)


def test_the_overview_lists_every_config():
    text = (FOLDER / "README.md").read_text()
    listed = set(re.findall(r"`BACKBONE_(\w+)(?:\.yaml)?`", text))
    assert listed - {"EXPERIMENT"} == set(names_of("experiments")) | set(SHORT)
    assert set(names_of("backbones")) <= set(re.findall(r"`(\w+)`", text))
    assert {path.name for path in FOLDER.glob("*.yaml")} <= set(re.findall(r"`(\w+\.yaml)`", text))


def test_lightning_list_configs_names_parts_and_combinations(capsys):
    assert main(["list", "configs"]) == 0
    names = {line.split()[0] for line in capsys.readouterr().out.splitlines()}
    assert {"demo.yaml", "backbones/vit_l14_336.yaml", "experiments/voc20.yaml"} <= names
    assert {f"{name}.yaml" for name in BEFORE} <= names
