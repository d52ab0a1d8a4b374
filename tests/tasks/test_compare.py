"""Runs side by side, against what the runs themselves hold."""

import csv
import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from tasks.__main__ import main
from tasks.run import Run
from tasks.run.compare import compare
from tests.tasks.test_segmentation import label_maps


def numbers(path) -> list[dict]:
    return list(csv.DictReader(path.open()))


def summary(run) -> dict:
    return json.loads((run / "metrics.json").read_text())


@pytest.fixture(scope="module")
def runs(predict, finished, tmp_path_factory):
    other = tmp_path_factory.mktemp("runs") / "paper"
    return finished, predict(other, "--model.feature_surgery=paper")


def test_metrics_classes_and_settings_side_by_side(runs, tmp_path, capsys):
    folder = tmp_path / "found"
    assert main(["compare", *map(str, runs), f"--output={folder}"]) == 0
    said = capsys.readouterr().out
    one, two = (summary(run) for run in runs)
    for row in numbers(folder / "metrics.csv"):
        name = row["metric"]
        a, b = one["metrics"][name], two["metrics"][name]
        assert float(row["finished"]) == a
        assert float(row["paper"]) == b
        assert float(row["paper - finished"]) == pytest.approx(b - a)
        assert f"{100 * (b - a):.2f}" in said
    classes = numbers(folder / "classes.csv")
    differences = [abs(float(row["paper - finished"])) for row in classes]
    assert differences == sorted(differences, reverse=True)
    assert max(differences) > 0
    for row in classes:
        found = [s["per_class"][row["class"]][row["column"]] for s in (one, two)]
        assert [float(row["finished"]), float(row["paper"])] == found
        assert row["column"] != "images"
    (setting,) = numbers(folder / "settings.csv")
    assert setting == {
        "setting": "task.feature_surgery",
        "finished": "code",
        "paper": "paper",
    }
    assert "| task.feature_surgery | code | paper |" in (folder / "compare.md").read_text()


def test_cosines_and_distances_are_no_shares(predict, tmp_path):
    run = predict(tmp_path / "run", task="Analysis")
    found = compare([Run.load(run), Run.load(run)])
    metrics = found.sides["metrics"].text()
    value = summary(run)["metrics"]
    assert re.search(rf"affinity_positive +{value['affinity_positive']:.4f}", metrics)
    assert re.search(rf"redundancy_empty +{value['redundancy_empty']:.4f}", metrics)
    assert re.search(rf"mFSR_raw +{100 * value['mFSR_raw']:.2f}", metrics)
    name, row = next(iter(summary(run)["per_class"].items()))
    classes = found.sides["classes"].text()
    assert re.search(rf"{name} +L1_empty_plain +{row['L1_empty_plain']:.4f}", classes)
    assert re.search(rf"{name} +FSR_raw +{100 * row['FSR_raw']:.2f}", classes)


def test_the_images_that_differ_most_come_first(predict, tmp_path):
    one, two = (
        predict(tmp_path / f, f"--model.backbone.attention={f}", task="Segmentation")
        for f in ("surgery", "raw")
    )
    assert main(["compare", str(one), str(two), f"--output={tmp_path / 'found'}"]) == 0
    first, second = label_maps(one), label_maps(two)
    unlike = {key: float(np.mean(first[key] != second[key])) for key in first}
    rows = numbers(tmp_path / "found" / "images.csv")
    assert len(rows) == 10
    assert [float(r["disagreement"]) for r in rows] == sorted(unlike.values(), reverse=True)[:10]
    assert all(float(row["disagreement"]) == unlike[row["image"]] for row in rows)


def test_a_run_agrees_with_itself_and_masks_are_compared_one_by_one(runs, tmp_path):
    for other, nothing in ((runs[0], True), (runs[1], False)):
        folder = tmp_path / str(nothing)
        assert main(["compare", str(runs[0]), str(other), f"--output={folder}"]) == 0
        values = [float(row["disagreement"]) for row in numbers(folder / "images.csv")]
        assert all(0 <= value <= 1 for value in values)
        assert (max(values) == 0) is nothing


def test_long_names_become_letters_for_people(runs, tmp_path, capsys):
    long = tmp_path / "vit_b16_voc_explainability"
    shutil.copytree(runs[1], long)
    folder = tmp_path / "found"
    assert main(["compare", str(runs[0]), str(long), f"--output={folder}", "--images=0"]) == 0
    said = capsys.readouterr().out
    assert said.splitlines()[:2] == ["A: finished", f"B: {long.name}"]
    assert said.count(long.name) == 1
    assert ["metric", "A", "B", "B", "-", "A"] in [line.split() for line in said.splitlines()]
    assert "| metric | A | B | B - A |" in (folder / "compare.md").read_text()
    assert list(numbers(folder / "metrics.csv")[0]) == [
        "metric",
        "finished",
        long.name,
        f"{long.name} - finished",
    ]


def test_what_is_no_run_is_told(runs, tmp_path, capsys):
    (tmp_path / "own").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "own" / "a.png")
    assert main(["compare", str(runs[0]), str(tmp_path / "own")]) == 1
    assert "is not a run's folder" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main(["compare", str(runs[0])])
    assert stop.value.code == 2
