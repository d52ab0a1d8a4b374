"""Help: of commands, and of the fields of tasks and data sets, without loading what is slow."""

import subprocess
import sys

import pytest

from datamodules import DATASETS
from tasks import TASKS
from tasks.__main__ import COMMANDS, main
from tasks._help import OFTEN, SECTIONS


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


def test_help_of_shards_loads_nothing_heavy():
    shown, modules = run_apart("shards", "--help")
    assert "pascal_context" in shown
    assert "torch" not in modules


def test_help_of_predict_fits_a_screen_and_loads_nothing_heavy():
    shown, modules = run_apart("predict", "--help")
    assert all(name in shown for name in (*TASKS.values(), *DATASETS.values(), *SECTIONS))
    assert "--trainer.accelerator" in shown
    assert len(shown.splitlines()) <= 50
    assert max(map(len, shown.splitlines())) <= 110
    assert "torch" not in modules


def shown_by(capsys, *words: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main(["predict", *words])
    assert stop.value.code == 0
    return capsys.readouterr().out


def test_help_with_a_task_and_a_data_set_shows_their_fields(capsys):
    shown = shown_by(capsys, "--model", "Segmentation", "--data", "Images", "--help")
    fields = ("--model.window", "--model.backbone.attention", "--data.path", "--writer.layout")
    assert all(field in shown for field in fields)
    assert "--trainer" not in shown.partition("More:")[0]
    assert "return_predictions" not in shown  # they are never kept in memory


@pytest.mark.parametrize(
    ("topic", "there", "not_there"),
    [
        ("segmentation", "--model.window", "--data."),
        ("Images", "--data.names", "--model."),
        ("writer", "--writer.layout", "--data."),
        ("trainer", "--trainer.precision", "--model."),
    ],
)
def test_help_by_topic(topic, there, not_there, capsys):
    for words in (["--help", topic], [f"--help={topic}", "--config", "demo"]):
        shown = shown_by(capsys, *words)
        assert f"\n  {there}" in shown
        assert f"\n  {not_there}" not in shown


def test_help_knows_the_fields_that_it_names(capsys):
    words = ("--model", "Explainability", "--data", "Shapes", "--help", "all")
    shown = shown_by(capsys, *words)
    assert all(field.split()[0] in shown for field in OFTEN)


def test_no_command_shows_help_and_fails(capsys):
    assert main([]) in (0, 2)
    assert "predict" in capsys.readouterr().out


def test_shards_help_shows_the_expected_layout(capsys):
    with pytest.raises(SystemExit):
        main(["shards", "voc", "--help"])
    assert "SegmentationClass" in capsys.readouterr().out
