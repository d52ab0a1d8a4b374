"""What users mistype or forget is told in a sentence that says what to do."""

import logging

import open_clip
import PIL.Image
import pytest

from datamodules import DATASETS
from tasks import TASKS
from tasks.__main__ import main


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


def test_what_a_constructor_refuses_is_said_in_its_own_words(capsys):
    assert main(["predict", "--config", "demo.yaml", "--data.part", "3"]) == 1
    said = capsys.readouterr().err
    assert "--data.part counts from 0" in said
    assert "Union" not in said


def test_an_unknown_command_is_refused():
    with pytest.raises(SystemExit) as stop:
        main(["train"])
    assert stop.value.code == 2


def test_a_wrong_config_name_lists_the_nearest(capsys):
    assert main(["predict", "--config", "vit_b16_vok.yaml"]) == 2
    assert "vit_b16_voc" in capsys.readouterr().err


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


def test_missing_shards_say_what_to_do(capsys):
    words = ["predict", "--config", "vit_b16_voc.yaml", "--data.shards", "nowhere"]
    assert main(words) == 1
    assert "--data.shards" in capsys.readouterr().err


def test_a_wrong_source_folder_shows_expected_and_found(tmp_path, capsys):
    (tmp_path / "holiday").mkdir()
    words = ["shards", "voc", "--source", str(tmp_path), "--output", str(tmp_path / "out")]
    assert main(words) == 1
    said = capsys.readouterr().err
    assert "SegmentationClass" in said
    assert "holiday" in said
