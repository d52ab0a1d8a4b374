"""The command line: what a newcomer types first, and what they mistype."""

import subprocess
import sys
from importlib.metadata import entry_points

import pytest
import yaml

from datamodules import DATASETS
from tasks import TASKS
from tasks.__main__ import COMMANDS, main
from tasks._configs import find_config, packaged


def test_our_script_is_the_only_one_of_its_name():
    (script,) = entry_points(group="console_scripts", name="lightning")
    assert script.value == "tasks.__main__:main"


def run_apart(*words: str) -> tuple[str, set[str]]:
    """What a command prints in a process of its own, and the modules that it has then loaded."""
    check = "import atexit; atexit.register(lambda: print(*sys.modules))"
    code = f"import sys; {check}; from tasks.__main__ import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", code, *words]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    *text, modules = shown.splitlines()
    return "\n".join(text), set(modules.split())


def test_help_names_every_command_without_loading_torch():
    shown, modules = run_apart("--help")
    assert all(name in shown for name in COMMANDS)
    assert "torch" not in modules


def test_a_run_imports_only_its_own_task_and_data_set():
    words = ["predict", "--config", "vit_b16_voc.yaml", "--print_config"]
    for more in ([], ["--model", "Explainability", "--data=VOC"]):
        _, modules = run_apart(*words, *more)
        assert modules & {f"tasks.{name}" for name in TASKS} == {"tasks.explainability"}
        assert modules & {f"datamodules.{name}" for name in DATASETS} == {"datamodules.voc"}
        assert "open_clip" not in modules


def test_help_of_shards_loads_nothing_heavy():
    shown, modules = run_apart("shards", "--help")
    assert "pascal_context" in shown
    assert "torch" not in modules


def test_help_lists_every_task_and_data_set(capsys):
    with pytest.raises(SystemExit):
        main(["predict", "--help"])
    shown = capsys.readouterr().out
    assert all(f"tasks.{name}" in shown for name in TASKS.values())
    assert all(f"datamodules.{name}" in shown for name in DATASETS.values())


@pytest.mark.parametrize(
    ("words", "near"),
    [
        (["--model", "Explainabilty"], "Explainability"),
        (["--model=Segmentation", "--data=Shape"], "Shapes"),
        (["--data.class_path", "Voc"], "VOC"),
    ],
)
def test_a_wrong_class_name_lists_the_nearest_and_the_others(words, near, capsys):
    assert main(["predict", "--config", "demo.yaml", *words]) == 1
    said = capsys.readouterr().err
    assert f"Did you mean {near}" in said
    assert all(name in said for name in (DATASETS if "data set" in said else TASKS).values())


def test_a_wrong_class_name_in_a_config_lists_the_nearest(tmp_path, capsys):
    path = tmp_path / "own.yaml"
    path.write_text("model:\n  class_path: Segmentaton\n")
    assert main(["predict", "--config", str(path), "--data=VOC", "--data.shards=x"]) == 1
    assert "Did you mean Segmentation" in capsys.readouterr().err


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


def test_what_a_constructor_refuses_is_said_in_its_own_words(capsys):
    assert main(["predict", "--config", "demo.yaml", "--data.part", "3"]) == 1
    said = capsys.readouterr().err
    assert "--data.part counts from 0" in said
    assert "Union" not in said


def test_version(capsys):
    assert main(["--version"]) == 0
    assert "torch" in capsys.readouterr().out


def test_no_command_shows_help_and_fails(capsys):
    assert main([]) in (0, 2)
    assert "predict" in capsys.readouterr().out


def test_an_unknown_command_is_refused():
    with pytest.raises(SystemExit) as stop:
        main(["train"])
    assert stop.value.code == 2


def test_a_wrong_config_name_lists_the_nearest(capsys):
    assert main(["predict", "--config", "vit_b16_vok.yaml"]) == 1
    assert "vit_b16_voc.yaml" in capsys.readouterr().err


def test_packaged_configs_are_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_config("vit_b16_voc.yaml") == find_config("vit_b16_voc")
    (tmp_path / "vit_b16_voc.yaml").write_text("{}")
    assert find_config("vit_b16_voc.yaml") == "vit_b16_voc.yaml"


@pytest.mark.parametrize("path", packaged(), ids=lambda p: p.name)
def test_every_packaged_config_parses(path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["predict", "--config", path.name, "--print_config"])
    assert stop.value.code == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["writer"]["output"] == f"runs/{path.stem}"
    assert path.read_text().startswith("# ")


def test_every_field_can_be_overridden(capsys):
    words = "--model.backbone.pretrained null --model.threshold 0.25 --data.batch_size 2"
    with pytest.raises(SystemExit):
        main(["predict", "--config", "vit_b16_voc.yaml", *words.split(), "--print_config"])
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["model"]["init_args"]["threshold"] == 0.25
    assert shown["data"]["init_args"]["batch_size"] == 2


def test_predictions_are_never_kept_in_memory(capsys):
    with pytest.raises(SystemExit):
        main(["predict", "--help"])
    assert "return_predictions" not in capsys.readouterr().out


def test_missing_shards_say_what_to_do(capsys):
    words = ["predict", "--config", "vit_b16_voc.yaml", "--data.shards", "nowhere"]
    assert main(words) == 1
    assert "--data.shards" in capsys.readouterr().err


@pytest.mark.parametrize("what", ["configs", "datasets", "models", "recipes", "tasks"])
def test_lists(what, capsys):
    assert main(["list", what]) == 0
    assert len(capsys.readouterr().out.splitlines()) >= 1


def test_shards_help_shows_the_expected_layout(capsys):
    with pytest.raises(SystemExit):
        main(["shards", "voc", "--help"])
    assert "SegmentationClass" in capsys.readouterr().out


def test_a_wrong_source_folder_shows_expected_and_found(tmp_path, capsys):
    (tmp_path / "holiday").mkdir()
    words = ["shards", "voc", "--source", str(tmp_path), "--output", str(tmp_path / "out")]
    assert main(words) == 1
    said = capsys.readouterr().err
    assert "SegmentationClass" in said
    assert "holiday" in said
