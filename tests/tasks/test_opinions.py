"""Text opinions through the command line: repeatable, and fed into maps."""

import csv
import io
import json
import signal

import numpy as np
import pytest
import torch
from PIL import Image

from common import signals
from datamodules.shapes import INFO
from surgery.backbone import Backbone
from tasks import Run
from tasks.__main__ import main
from tasks.measures.opinions import OpinionsMeasures
from tasks.run.results import Points
from tests.tasks.conftest import members, same_results
from tests.tasks.test_interactive import sam_folder

FAST = (
    "--model.steps=6",
    "--model.sequences=2",
    "--model.length=2",
    "--model.views=2",
    "--model.micro_batch=2",
    "--model.explained=2",
)


@pytest.fixture(scope="module")
def two_scenes(tmp_path_factory):
    """Two drawn scenes in one shard."""
    folder = tmp_path_factory.mktemp("shards") / "two"
    command = ["shards", "shapes", "--count", "2", "--seed", "5", "--size", "64"]
    assert main([*command, "--output", str(folder), "--workers", "1"]) == 0
    return f"--data.shards={folder}"


@pytest.fixture(scope="module")
def run(predict, two_scenes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "opinions"
    return predict(folder, *FAST, two_scenes, "--writer.overlays=true", task="Opinions")


def test_words_and_maps(run):
    found = members(run / "000000.tar")
    for key in ("00000000", "00000001"):
        record = json.loads(found[f"{key}.json"])
        # The second half of the steps, each with at most one word a token and hardly more.
        assert 0 < sum(record["frequencies"].values()) <= 3 * 2 * 2 * 2
        counts = list(record["frequencies"].values())
        assert counts == sorted(counts, reverse=True)
        assert len(record["opinions"]) == 2
        assert record["opinions"][0]["score"] >= record["opinions"][1]["score"]
        assert list(record["words"]) == list(record["frequencies"])[:2]
        scores = np.load(io.BytesIO(found[f"{key}.scores.npy"]))
        assert scores.shape == (len(record["words"]), 6, 6)
        (plain,) = record["methods"]
        assert plain == "clip"
        beside = record["methods"][plain]["words"]
        assert list(beside) == list(record["words"])
        plain_scores = np.load(io.BytesIO(found[f"{key}.clip.scores.npy"]))
        assert plain_scores.shape == scores.shape
        assert not np.array_equal(plain_scores, scores)
        assert all(f"{key}.clip.{file}" in found for file in beside.values())
        for file in record["words"].values():
            mask = np.asarray(Image.open(io.BytesIO(found[f"{key}.{file}"])))
            assert mask.shape == (64, 64)
            assert set(np.unique(mask)) == {0, 255}
            overlay = file.replace("mask.", "map.").replace(".png", ".jpg")
            assert f"{key}.{overlay}" in found
            assert f"{key}.clip.{overlay}" in found


def test_summary(run):
    found = members(run / "000000.tar")
    records = [json.loads(found[f"{key}.json"]) for key in ("00000000", "00000001")]
    rows = {row["word"]: row for row in csv.DictReader((run / "words.csv").open())}
    assert set(rows) == {word for record in records for word in record["frequencies"]}
    for word, row in rows.items():
        times = [record["frequencies"].get(word, 0) for record in records]
        assert int(row["times"]) == sum(times)
        assert int(row["images"]) == sum(n > 0 for n in times)
    longest = [row["word"] for row in csv.DictReader((run / "longest_words.csv").open())]
    assert set(longest) == set(rows)
    assert [len(word) for word in longest] == sorted(map(len, longest), reverse=True)
    summary = json.loads((run / "metrics.json").read_text())
    best = [record["opinions"][0]["score"] for record in records]
    assert summary["metrics"]["best_cosine"] == pytest.approx(np.mean(best), abs=1e-5)
    assert summary["details"]["longest_words"] == longest[:20]


def test_words_above_a_count_with_a_prompt_by_adam_with_sam(predict, two_scenes, tmp_path):
    sam = sam_folder(tmp_path / "sam", "sam")
    folder = predict(
        tmp_path / "run",
        *FAST,
        two_scenes,
        "--model.backbone.model=demo",  # few words, so that some are met often
        "--model.backbone.pretrained=demo",
        "--model.explained=null",
        "--model.min_count=2",
        "--model.prompt=a red",
        "--model.optimiser=adam",
        "--model.fresh_views=true",
        "--model.beside=[]",
        f"--model.sam={sam}",
        "--writer.overlays=true",
        task="Opinions",
    )
    run = Run.load(folder)
    assert run.settings["task"]["lr"] == 5
    assert "sam" in json.loads((folder / "run.json").read_text())["identity"]
    explained = 0
    for image in run.images():
        record = image.record
        often = [word for word, times in record["frequencies"].items() if times >= 2]
        assert list(record["words"]) == often
        explained += len(often)
        assert all(text["text"].startswith("a red ") for text in record["opinions"])
        if often:
            points = image.get(Points, "sam")
            assert list(points.points) == often
            assert points.masks.masks.shape == (len(often), 64, 64)
            drawn = [name for name in image.pictures if name.startswith("sam.points.")]
            assert len(drawn) == len(often)
    assert explained
    assert main(["report", str(folder)]) == 0


def test_all_long_words_are_listed():
    measures = OpinionsMeasures(INFO)
    words = [f"{letter}{'x' * 9}" for letter in "abcdefghijklm"] * 10
    words = [f"{word}{i}" for i, word in enumerate(words)]
    measures.update({**dict.fromkeys(words, 2), "short": 1}, torch.tensor(0.5))
    rows = measures.report().tables["longest_words"].rows
    assert {row[0] for row in rows} == set(words)
    assert rows[0][1:] == (13, 1, 2)


def test_an_image_does_not_feel_its_batch(run, predict, two_scenes, tmp_path):
    alone = predict(
        tmp_path / "alone",
        *FAST,
        two_scenes,
        "--data.batch_size=1",
        "--writer.overlays=true",
        task="Opinions",
    )
    assert same_results(run, alone)


def test_own_pictures_and_another_seed(run, predict, tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    Image.new("RGB", (40, 30), (200, 30, 30)).save(pictures / "red.png")
    words = []
    for seed in (0, 1):
        folder = predict(
            tmp_path / f"run{seed}",
            *FAST,
            "--data=Images",
            f"--data.path={pictures}",
            f"--model.seed={seed}",
            task="Opinions",
        )
        words.append((folder / "words.csv").read_text())
    assert words[0] != words[1]


def test_a_stop_does_not_wait_for_the_end_of_a_climb(command, two_scenes, monkeypatch, tmp_path):
    climbed = []
    encode = Backbone.encode_embeddings

    def count(*args):
        climbed.append(1)
        monkeypatch.setattr(signals, "reason", lambda: signals.Stopped(signal.SIGTERM))
        return encode(*args)

    monkeypatch.setattr(Backbone, "encode_embeddings", count)
    assert main(command(tmp_path / "run", *FAST, two_scenes, task="Opinions")) == 143
    assert len(climbed) == 1
    assert not list((tmp_path / "run").glob("*.tar"))
