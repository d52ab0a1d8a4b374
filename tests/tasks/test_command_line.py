"""The command line: commands, configs by name and by path, fields, classes of tasks and data sets."""

import os
import subprocess
import sys
from importlib.metadata import entry_points

import pytest
import yaml

from tasks.__main__ import main


def test_our_script_is_the_only_one_of_its_name():
    (script,) = entry_points(group="console_scripts", name="lightning")
    assert script.value == "tasks.__main__:main"


@pytest.mark.parametrize(
    "name", ["Segmentation", "tasks.Segmentation", "tasks.segmentation.Segmentation"]
)
def test_classes_are_known_by_name_and_by_path(name, tmp_path, capsys):
    path = tmp_path / "own.yaml"
    path.write_text("class_path: datamodules.voc.VOC\ninit_args:\n  shards: somewhere\n")
    words = ["--config=demo.yaml", f"--model={name}", f"--data={path}", "--print_config"]
    with pytest.raises(SystemExit) as stop:
        main(["predict", *words])
    assert stop.value.code == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["model"]["class_path"].endswith("Segmentation")
    assert shown["data"]["class_path"].endswith("VOC")


def test_a_config_may_name_a_class_alone(tmp_path, capsys):
    path = tmp_path / "own.yaml"
    path.write_text("model: Recognition\ndata: VOC\n")
    with pytest.raises(SystemExit) as stop:
        main(["predict", "--config", str(path), "--data.shards=x", "--print_config"])
    assert stop.value.code == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["model"]["class_path"] == "tasks.Recognition"
    assert shown["data"]["init_args"]["shards"] == "x"


def test_version(capsys):
    assert main(["--version"]) == 0
    assert "torch" in capsys.readouterr().out


def test_a_file_comes_before_a_packaged_config_of_its_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "vit_b16_voc.yaml").write_text("model: Segmentation\ndata: VOC\n")
    for name, task in (("vit_b16_voc", "Explainability"), ("vit_b16_voc.yaml", "Segmentation")):
        with pytest.raises(SystemExit):
            main(["predict", "--config", name, "--data.shards=x", "--print_config"])
        assert f"tasks.{task}" in capsys.readouterr().out


def test_every_field_can_be_overridden(capsys):
    words = "--model.backbone.pretrained null --model.threshold 0.25 --data.batch_size 2"
    with pytest.raises(SystemExit):
        main(["predict", "--config", "vit_b16_voc.yaml", *words.split(), "--print_config"])
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["model"]["init_args"]["threshold"] == 0.25
    assert shown["data"]["init_args"]["batch_size"] == 2


def test_a_config_sets_any_field_of_the_trainer(tmp_path, capsys):
    path = tmp_path / "own.yaml"
    path.write_text(
        "trainer:\n  accelerator: cpu\n  strategy: ddp\n  precision: bf16-mixed\n  callbacks:\n"
        "  - class_path: lightning.pytorch.callbacks.DeviceStatsMonitor\n"
    )
    with pytest.raises(SystemExit) as stop:
        main(["predict", "--config", "vit_b16_voc", "--config", str(path), "--print_config"])
    assert stop.value.code == 0
    trainer = yaml.safe_load(capsys.readouterr().out)["trainer"]
    assert (trainer["accelerator"], trainer["strategy"]) == ("cpu", "ddp")
    assert trainer["callbacks"][0]["class_path"].endswith("DeviceStatsMonitor")


@pytest.mark.parametrize("words", ["list configs", "--help", "predict --help", "shards voc --help"])
def test_a_reader_that_leaves_early_sees_no_traceback(words):
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "tasks", *words.split()]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert done.stderr == ""


def test_a_callback_whose_defaults_are_no_plain_values(predict, tmp_path):
    run = predict(tmp_path / "run", "--trainer.callbacks=Timer")
    (timer,) = [yaml.safe_load((run / "config.yaml").read_text())["trainer"]["callbacks"]]
    assert timer["init_args"]["interval"] == "step"


@pytest.mark.parametrize("what", ["configs", "datasets", "methods", "models", "recipes", "tasks"])
def test_lists(what, capsys):
    assert main(["list", what]) == 0
    assert len(capsys.readouterr().out.splitlines()) >= 1
