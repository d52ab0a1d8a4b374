"""What a person sees of a run: what was loaded, how far it is, and what its numbers mean."""

import csv
import json
import sys

import pytest
import torch
from PIL import Image

from datamodules import Shapes
from tasks import TASKS, _progress
from tasks.__main__ import main
from tasks.measures import measures_of
from tasks.run.meaning import MEANINGS, meaning_of, remarks

SETTINGS = {
    "Explainability": {
        "order": "code",
        "threshold": 0.5,
        "void": "ignore",
        "methods": ["surgery"],
    },
    "Segmentation": {"background": None, "prob_thd": None},
    "Recognition": {"form": "paper"},
    "Interactive": {"sam": "some", "methods": ["surgery"], "down_sample": 2},
    "Multimodal": {"backbone": {"model": "ViT-B-16"}},
    "Opinions": {},
    "Analysis": {"selection": True, "affinity": True, "redundancy": True},
}


@pytest.mark.parametrize("task", sorted(TASKS.values()))
def test_every_metric_is_explained(task):
    measures = measures_of(task, Shapes.info, SETTINGS[task])
    if task == "Analysis":  # its values' sizes come with the first image
        shapes = {"selection": (1, 4), "modules": (2, 24), "final": (2,), "redundancy": (1, 2, 4)}
        measures.update({name: torch.zeros(shape) for name, shape in shapes.items()}, (0,))
    if task == "Recognition":
        measures.update(
            {way: torch.zeros(1, 12) for way in measures.precision}, torch.ones(1, 12) > 0
        )
    metrics = measures.report().metrics
    assert metrics
    assert all(meaning_of(task, name) for name in metrics)
    assert meaning_of(task, "somebody_elses") is None
    assert set(MEANINGS) == set(TASKS.values())


def test_shares_are_percent_and_cosines_are_not():
    assert meaning_of("Explainability", "mIoU").show(0.5) == "50.00 %"
    assert "%" not in meaning_of("Analysis", "affinity_positive").show(0.5)
    assert meaning_of("Opinions", "best_cosine").show(None) == "--"


def test_where_surgery_is_below_clip_is_remarked():
    shown = {"metrics": {"mAP": 0.956, "mAP_softmax": 0.984, "mAP_cosine": 0.92}}
    (remark,) = remarks("Recognition", shown)
    assert "mAP (95.60 %) is below mAP_softmax (98.40 %)" in remark
    methods = {
        "surgery": {"mIoU": 0.5, "mSC": 0.2},
        "clip": {"mIoU": 0.3, "mSC": 0.4},
        "legrad": {"mIoU": 0.1, "mSC": 0.1},
    }
    (remark,) = remarks("Explainability", {"metrics": methods["surgery"], "methods": methods})
    assert "mSC of surgery (20.00 %) is below plain CLIP's (40.00 %)" in remark
    assert remarks("Explainability", {"metrics": {}, "methods": {}}) == []


@pytest.fixture(scope="module")
def logged(command, tmp_path_factory):
    """Words of a run over five pictures, one of them broken, with lines for every batch."""
    folder = tmp_path_factory.mktemp("logged")
    (folder / "photos").mkdir()
    for i in range(4):
        Image.new("RGB", (32, 32), (60 * i, 0, 0)).save(folder / "photos" / f"{i}.png")
    (folder / "photos" / "9.png").write_bytes(b"broken")
    words = ["--data=Images", f"--data.path={folder / 'photos'}", "--data.names=[star,tree]"]
    words += ["--data.batch_size=2", "--trainer.enable_progress_bar=true"]
    return command(folder / "run", *words), folder / "run"


def test_a_run_in_a_log_is_lines(logged, monkeypatch, capsys):
    monkeypatch.setattr(_progress, "_SECONDS", 0.0)
    assert main(logged[0]) == 0
    said = capsys.readouterr().err.splitlines()
    assert not any("\r" in line for line in said)
    lines = [line for line in said if "images/s" in line]
    assert [line.split()[0] for line in lines] == ["2", "4", "5"]
    assert ", 0 errors" in lines[0]
    assert lines[-1].endswith("1 error")


def test_a_run_on_a_terminal_is_a_bar(logged, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert main([*logged[0], "--writer.overwrite=true"]) == 0
    said = capsys.readouterr().err
    assert "\r" in said
    assert "1 error]" in said


@pytest.mark.parametrize("more", [[], ["--writer.overwrite=true"]])
def test_metrics_go_to_the_users_loggers(more, command, tmp_path_factory, caplog):
    run = tmp_path_factory.getbasetemp() / "logger" / "run"
    words = ["--model.methods=[surgery,clip]", "--trainer.logger=CSVLogger"]
    with caplog.at_level("INFO", logger="tasks"):
        assert main(command(run, *words, f"--trainer.logger.save_dir={run}", *more)) == 0
    (line,) = [text for text in caplog.messages if text.startswith("Explainability of shapes")]
    assert "tiny (random), random weights, attention surgery, on cpu" in line
    assert "precision 32-true" in line
    version = max((run / "lightning_logs").iterdir())
    (row,) = csv.DictReader((version / "metrics.csv").open())
    methods = json.loads((run / "metrics.json").read_text())["methods"]
    assert float(row["mIoU"]) == methods["surgery"]["mIoU"]
    assert float(row["clip/mSC"]) == methods["clip"]["mSC"]
    assert (row["images"], row["errors"]) == ("20", "0")
