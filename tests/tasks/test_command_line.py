"""The command line: what a newcomer types first, and what they mistype."""

import json
import logging
import os
import subprocess
import sys
from importlib.metadata import entry_points

import open_clip
import PIL.Image
import pytest
import yaml

from datamodules import DATASETS
from tasks import TASKS
from tasks.__main__ import COMMANDS, main
from tasks._help import OFTEN, SECTIONS


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


@pytest.mark.parametrize(
    ("words", "near"),
    [
        (["predct"], "predict"),
        (["list", "confgs"], "configs"),
        (["list", "configs", "--hepl"], "--help"),
        (["shards", "vok"], "voc"),
        (["shards", "voc", "--sorce", "x"], "--source"),
        (["compare", "a", "b", "--ouput", "x"], "--output"),
        (["metrics", "x", "--hlep"], "--help"),
        (["reproduce", "tabel1", "--output", "x"], "table1"),
        (["completion", "zhs"], "zsh"),
        (["predict", "--help", "Segmentaton"], "Segmentation"),
        (["predict", "--config=demo", "--data.resize=sqash"], "squash"),
        (["predict", "--config=demo", "--trainer.logger=CSVLoger"], "CSVLogger"),
        (["predict", "--config=demo", "--model.methods=[surgry]"], "surgery"),
        (["predict", "--config=demo", "--model.order=cod"], "code"),
        (
            [
                "predict",
                "--config=demo",
                "--model.backbone.model=ViT-B-16",
                "--model.backbone.pretrained=opnai",
            ],
            "openai",
        ),
    ],
)
def test_an_error_names_the_nearest_that_there_is(words, near, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # away from runs/demo, which whoever tried the README has made
    try:
        code = main(words)
    except SystemExit as stop:
        code = stop.code
    assert code in (1, 2)
    assert f"did you mean '{near}'?" in capsys.readouterr().err


def test_completion_in_bash(tmp_path, capsys):
    assert main(["completion", "bash"]) == 0
    script = tmp_path / "completion.bash"
    script.write_text(capsys.readouterr().out)
    lines = {
        "lightning repr": "reproduce",
        "lightning predict --model Seg": "Segmentation",
        "lightning predict --model.backbone.atten": "--model.backbone.attention",
        "lightning predict --model.backbone.attention nac": "naclip",
        "lightning predict --data.resize squ": "squash",
        "lightning predict --config vit_b16_nus": "vit_b16_nus_wide",
        "lightning shards voc --sour": "--source",
        "lightning list met": "methods",
    }
    ask = """
    source "$1"; shift
    for line in "$@"; do
        COMP_WORDS=($line); COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); COMPREPLY=()
        f=$(complete -p lightning | sed "s/.*-F \\([^ ]*\\).*/\\1/")
        $f lightning "${COMP_WORDS[$COMP_CWORD]}" "${COMP_WORDS[$COMP_CWORD - 1]}"
        echo "${COMPREPLY[0]}"
    done"""
    done = subprocess.run(
        ["bash", "-c", ask, "bash", str(script), *lines], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == list(lines.values())


def test_completion_without_shtab_says_how_to_have_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["completion", "zsh"]) == 1
    assert "clip-surgery-lightning[completion]" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "near"),
    [
        (["--model", "Explainabilty"], "Explainability"),
        (["--model=Segmentation", "--data=Shape"], "Shapes"),
        (["--data.class_path", "Voc"], "VOC"),
    ],
)
def test_a_wrong_class_name_lists_the_nearest_and_the_others(words, near, capsys):
    assert main(["predict", "--config", "demo.yaml", *words]) == 2
    said = capsys.readouterr().err
    assert f"Did you mean {near}" in said
    assert all(name in said for name in (DATASETS if "data set" in said else TASKS).values())


def test_a_wrong_class_name_in_a_config_lists_the_nearest(tmp_path, capsys):
    path = tmp_path / "own.yaml"
    path.write_text("model:\n  class_path: Segmentaton\n")
    assert main(["predict", "--config", str(path), "--data=VOC", "--data.shards=x"]) == 2
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
    assert main(["predict", "--config", "vit_b16_vok.yaml"]) == 2
    assert "vit_b16_voc" in capsys.readouterr().err


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


VOC = ("--config", "vit_b16_voc")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "nothing to run: give --config NAME"),
        (["--config"], "--config: expected one argument"),
        (["--config", "."], "no config '.'"),
        (["--model", "Explainability"], "no data set: add --data with one of ADE20K, COCO"),
        (["--data", "VOC", "--data.shards=x"], "no task: add --model with one of Analysis"),
        (["--model=Explainability", "--data=VOC"], "needed: --data.shards"),
        ([*VOC, "--data.batchsize", "3"], "no field `batchsize`; did you mean `batch_size`?"),
        (
            [*VOC, "--model.backbone.atention", "raw"],
            "no field `atention`; did you mean `attention`?",
        ),
        ([*VOC, "--batch_size=3"], "did you mean `--data.batch_size`?"),
        ([*VOC, "--dta.batch_size=3"], "did you mean `--data.batch_size`?"),
        ([*VOC, "--model.tile=3"], "no field `tile`"),
        ([*VOC, "--model.backbone", "vit_l15"], "no backbone 'vit_l15'"),
        ([*VOC, "--data.batch_size", "x"], "--data.batch_size: expected int, got 'x'"),
        ([*VOC, "--data.batch_size"], "--data.batch_size: expected one argument"),
        ([*VOC, "--model.backbone.image_size=x"], "image_size: expected int or null, got 'x'"),
        (
            [*VOC, "--data.resize", "crop"],
            "expected 'squash' or 'short_side' or 'opencv', got 'crop'",
        ),
        ([*VOC, "--data.image_size=a"], "expected int or tuple[int, int] or null, got 'a'"),
        ([*VOC, "--trainer.max_epochs=x"], "--trainer.max_epochs: expected int or null, got 'x'"),
        ([*VOC, "--trainer.callbacks=Mine"], "--trainer.callbacks: expected"),
        (
            [*VOC, "--trainer.logger.name=x"],
            "--trainer.logger has no fields until it names a class",
        ),
        ([*VOC, "--trainer.logger=TensorBoardLogger"], "needed: --trainer.logger.save_dir"),
        ([*VOC, "photos"], "'photos' belongs to no option"),
        ([*VOC, "-x"], "'-x' belongs to no option"),
        ([*VOC, "--model", "mine.MyTask"], "no module 'mine'"),
        ([*VOC, "--model", "json.JSONDecoder"], "json.JSONDecoder is no task"),
        ([*VOC, "--model", "tasks.Segmentaton"], "did you mean Segmentation?"),
        ([*VOC, "--model", "own.yaml"], "no file 'own.yaml'"),
        ([*VOC, "--model", "{"], "not YAML"),
    ],
)
def test_a_mistyped_command_line_is_told_in_a_line(words, said, capsys):
    assert main(["predict", *words]) == 2
    message = capsys.readouterr().err
    assert said in message
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model: Explainability\n  data: [", "own.yaml, line 2: not YAML"),
        ("", "own.yaml: settings expected"),
        ("- model", "own.yaml: settings expected"),
        ("data: {class_path: VOC, init_args: {batchsize: 3}}", "did you mean `batch_size`?"),
        ("data: {init_args: {batch_size: x}}", "own.yaml: data.batch_size: expected int, got 'x'"),
        ("data: {class_path: VOC, batch_size: 3}", "fields belong below `init_args`"),
        (
            "model: {init_args: {backbone: {atention: raw}}}",
            "own.yaml: no field `atention`; did you",
        ),
        ("model: {init_args: {backbone: vit_b61}}", "own.yaml: no backbone 'vit_b61'"),
        ("model: 3", "own.yaml: model: a class name or settings expected, not 3"),
        ("modl: Explainability", "no field `modl`; did you mean `model`?"),
        ("writer: {outputs: here}", "own.yaml: no field `outputs`; did you mean `output`?"),
        ("trainer: {device: 1}", "own.yaml: no field `device`; did you mean `devices`?"),
        ("experiment: vok", "own.yaml: no experiment 'vok'"),
        ("data: data.yaml", "own.yaml: no file 'data.yaml'"),
    ],
)
def test_a_mistyped_config_is_told_in_a_line_with_its_name(text, said, tmp_path, capsys):
    path = tmp_path / "own.yaml"
    path.write_text(text)
    assert main(["predict", *VOC, "--config", str(path)]) == 2
    message = capsys.readouterr().err
    assert said in message
    assert len(message.splitlines()) == 1


def test_a_config_sets_any_field_of_the_trainer(tmp_path, capsys):
    path = tmp_path / "own.yaml"
    path.write_text(
        "trainer:\n  accelerator: cpu\n  strategy: ddp\n  precision: bf16-mixed\n  callbacks:\n"
        "  - class_path: lightning.pytorch.callbacks.DeviceStatsMonitor\n"
    )
    with pytest.raises(SystemExit) as stop:
        main(["predict", *VOC, "--config", str(path), "--print_config"])
    assert stop.value.code == 0
    trainer = yaml.safe_load(capsys.readouterr().out)["trainer"]
    assert (trainer["accelerator"], trainer["strategy"]) == ("cpu", "ddp")
    assert trainer["callbacks"][0]["class_path"].endswith("DeviceStatsMonitor")


@pytest.mark.parametrize(
    "words",
    [
        ["--trainer.accelerator", "tpu"],
        ["--trainer.accelerator", "abacus"],
        ["--trainer.devices", "0"],
        ["--trainer.strategy", "sideways"],
        ["--trainer.precision", "bf16-mixed", "--trainer.plugins", "abacus"],
    ],
)
def test_what_the_trainer_refuses_is_told_in_a_line(words, tmp_path, capsys):
    command = ["predict", "--config", "demo", f"--writer.output={tmp_path}", *words]
    assert main(command) in (1, 2)
    message = capsys.readouterr().err
    assert "--trainer" in message
    assert len(message.splitlines()) == 1


MINE = """
from base_of_mine import Base

class MyTask(Base):
    def __init__(self, loudness: int = 3, **kwargs):
        super().__init__(**kwargs)
        self.loudness = loudness
"""


def test_a_task_of_ones_own_lies_beside_the_config(tmp_path, monkeypatch, capsys, command):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "task_of_mine.py").write_text(MINE)
    (folder / "base_of_mine.py").write_text("from tasks import Explainability as Base\n")
    path = folder / "own.yaml"
    path.write_text("model:\n  class_path: task_of_mine.MyTask\n  init_args: {loudness: 11}\n")
    monkeypatch.setattr("sys.path", [*sys.path])
    words = [word for word in command(tmp_path / "run", "--config", path) if word != "--model"]
    words.remove("Explainability")
    assert main([*words, "--model.threshold=0.4"]) == 0
    task = json.loads((tmp_path / "run" / "run.json").read_text())["identity"]["task"]
    assert task["class"] == "MyTask"
    assert (task["loudness"], task["threshold"]) == (11, 0.4)
    assert (task["void"], task["backbone"]["blocks"]) == ("ignore", 6)


MEASURED = """
from tasks.measures import Report
from tasks.measures.explainability import ExplainabilityMeasures
from tasks import Explainability

class MyMeasures(ExplainabilityMeasures):
    def report(self):
        return Report({"mine": super().report().metrics["mIoU"]})

class MyTask(Explainability):
    measured_by = MyMeasures
"""


@pytest.mark.parametrize("measures", ["own", "ours"])
def test_the_metrics_of_a_task_of_ones_own(measures, tmp_path, monkeypatch, capsys, command):
    text = MEASURED if measures == "own" else MEASURED.replace("measured_by = My", "named_by = My")
    path, run = tmp_path / "own.yaml", tmp_path / "run"
    (tmp_path / f"measured_{measures}.py").write_text(text)
    path.write_text(f"model: {{class_path: measured_{measures}.MyTask}}")
    monkeypatch.setattr("sys.path", [*sys.path])
    assert (
        main([w for w in command(run, "--config", path, task="") if w not in ("--model", "")]) == 0
    )
    before = (run / "metrics.json").read_bytes()
    assert ("mine" in json.loads(before)["metrics"]) == (measures == "own")
    (run / "metrics.json").unlink()
    assert main(["metrics", str(run)]) == (1 if measures == "own" else 0)
    if measures == "own":  # nothing that a run's folder names is imported
        told = capsys.readouterr().err
        assert "measured_own.MyMeasures" in told
        assert f"lightning metrics {run} --config CONFIG" in told
        assert main(["metrics", str(run), "--config", "demo"]) == 1
        assert "names Explainability, and" in capsys.readouterr().err
        assert main(["metrics", str(run), "--config", str(path)]) == 0
    assert (run / "metrics.json").read_bytes() == before


@pytest.mark.parametrize(
    ("methods", "said"),
    [
        ("surgey", "no method 'surgey' among surgery, "),
        ("[clip, grad_cam2]", "did you mean 'grad_cam'?"),
        ("[clip, clip]", "expected different ones of surgery, "),
        ("[]", "expected different ones of surgery, "),
    ],
)
def test_a_mistyped_method_is_told_with_those_there_are(methods, said, capsys):
    assert main(["predict", *VOC, "--data.shards=x", "--model.methods", methods]) == 1
    told = capsys.readouterr().err
    assert said in told
    assert len(told.splitlines()) == 1


def test_the_current_folder_is_not_where_classes_are_looked_for(tmp_path):
    (tmp_path / "torch.py").write_text("raise SystemExit('imported from the current folder')")
    (tmp_path / "json.py").write_text("raise SystemExit('imported from the current folder')")
    (tmp_path / "trap.py").write_text("raise SystemExit('imported from the current folder')")
    words = ["predict", *VOC, "--model", "trap.Task"]
    done = subprocess.run(
        [sys.executable, "-m", "tasks", *words], cwd=tmp_path, capture_output=True, text=True
    )
    assert "no module 'trap'" in done.stderr
    assert "imported from" not in done.stderr


@pytest.mark.parametrize("words", ["list configs", "--help", "predict --help", "shards voc --help"])
def test_a_reader_that_leaves_early_sees_no_traceback(words):
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "tasks", *words.split()]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert done.stderr == ""


def test_a_hub_that_cannot_be_reached_is_told_in_a_sentence(tmp_path, monkeypatch, capsys):
    def fail(*_):
        logging.getLogger("huggingface_hub.utils").warning("Retrying in 1s")
        raise OSError("no route to host")

    monkeypatch.setattr(open_clip, "download_pretrained", fail)
    PIL.Image.new("RGB", (32, 32)).save(tmp_path / "cat.jpg")
    words = [f"--data.path={tmp_path}", "--data.names=[cat]", f"--writer.output={tmp_path / 'run'}"]
    words += ["--data.num_workers=0", "--trainer.accelerator=cpu"]
    assert main(["predict", "--config", "images", *words]) == 1
    message = capsys.readouterr().err
    assert "Without a connection, give the path of a weights file" in message
    assert len(message.splitlines()) == 1


def test_a_place_that_can_not_be_written_is_told_in_a_line(finished, capsys):
    where = f"{__file__}/there"
    assert main(["compare", str(finished), str(finished), "--images=0", f"--output={where}"]) == 1
    message = capsys.readouterr().err
    assert message.startswith("lightning compare: ")
    assert where in message
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("--data.num_workers=-1", "--data.num_workers must be at least 0"),
        ("--data.image_size=0", "--data.image_size is in pixels"),
        ("--data.image_size=[32,-1]", "--data.image_size is in pixels"),
        (f"--writer.output={__file__}/run", "is a file, no folder"),
    ],
)
def test_a_value_that_makes_no_sense_is_refused(word, said, tmp_path, command, capsys):
    assert main(command(tmp_path / "run", word)) == 1
    assert said in capsys.readouterr().err


def test_a_callback_whose_defaults_are_no_plain_values(predict, tmp_path):
    run = predict(tmp_path / "run", "--trainer.callbacks=Timer")
    (timer,) = [yaml.safe_load((run / "config.yaml").read_text())["trainer"]["callbacks"]]
    assert timer["init_args"]["interval"] == "step"


def test_missing_shards_say_what_to_do(capsys):
    words = ["predict", "--config", "vit_b16_voc.yaml", "--data.shards", "nowhere"]
    assert main(words) == 1
    assert "--data.shards" in capsys.readouterr().err


@pytest.mark.parametrize("what", ["configs", "datasets", "methods", "models", "recipes", "tasks"])
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
