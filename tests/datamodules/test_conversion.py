"""Conversion as a whole: parallel, resumed after being killed, the same bytes each time; verify."""

import gzip
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image

from datamodules import GCC3M
from datamodules._convert import write_shards
from tasks.__main__ import main
from tests.datamodules.fakes import fake_coco, fake_voc
from tests.datamodules.toy import toy
from tests.tasks.conftest import FOREVER, TINY

ROOT = Path(__file__).parents[2]


def checksums(folder: Path):
    return [
        shard["sha256"] for shard in json.loads((folder / "dataset.json").read_text())["shards"]
    ]


@pytest.mark.processes
def test_killed_in_the_middle_and_run_again(tmp_path):
    write_shards(toy(tmp_path / "in"), tmp_path / "whole", shard_size=3, workers=1)
    code = (
        "from pathlib import Path; from datamodules._convert import write_shards;"
        "from tests.datamodules.toy import toy;"
        f"p = Path({str(tmp_path)!r});"
        "write_shards(toy(p / 'in', delay=0.15), p / 'out', shard_size=3, workers=1)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    try:
        deadline = time.time() + FOREVER
        while not (tmp_path / "out" / "000001.tar").exists() and time.time() < deadline:
            time.sleep(0.02)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    out = tmp_path / "out"
    left = sorted(p.name for p in out.glob("*.tar"))
    assert left[:2] == ["000000.tar", "000001.tar"]
    assert len(left) < 4
    assert "unfinished" in json.loads((out / "dataset.json").read_text())
    for name in left:  # whatever has its final name is whole
        with tarfile.open(out / name) as tar:
            assert len(tar.getnames()) == 9
    before = {name: (out / name).stat().st_mtime_ns for name in left}
    write_shards(toy(tmp_path / "in"), out, shard_size=3, workers=1)
    assert {name: (out / name).stat().st_mtime_ns for name in left} == before
    assert checksums(out) == checksums(tmp_path / "whole")
    assert not list(out.glob("*.partial"))


@pytest.mark.processes
def test_workers_write_the_same_bytes(tmp_path):
    source = toy(tmp_path / "in")
    write_shards(source, tmp_path / "one", shard_size=5, workers=1)
    write_shards(source, tmp_path / "two", shard_size=5, workers=2)
    assert checksums(tmp_path / "one") == checksums(tmp_path / "two")


def test_another_option_makes_other_shards(tmp_path):
    fake_coco(tmp_path / "in")
    argv = ["shards", "coco", "--source", str(tmp_path / "in"), "--workers", "1"]
    argv += ["--output", str(tmp_path / "out")]
    assert main(argv) == 0
    first = checksums(tmp_path / "out")
    assert main([*argv, "--crowd", "foreground"]) == 0
    assert checksums(tmp_path / "out") != first


@pytest.fixture
def shards(tmp_path):
    write_shards(toy(tmp_path / "in", 4), tmp_path / "out", shard_size=2, workers=1)
    return tmp_path / "out"


def test_verify_finds_nothing_wrong(shards, capsys):
    assert main(["shards", "verify", str(shards), "--workers", "1"]) == 0
    assert "4 samples in 2 shards, 0 problems" in capsys.readouterr().out


def test_verify_lists_all_offenders(shards, capsys):
    members = {"a.json": b"{}", "b.png": png(np.zeros((4, 4, 3)))}
    members |= {"c.png": png(np.zeros((4, 4, 3))), "c.label.png": png(np.full((4, 4), 7))}
    members |= {"d.png": png(np.zeros((4, 4, 3))), "d.label.png": png(np.zeros((4, 5)))}
    with tarfile.open(shards / "000000.tar", "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    data = (shards / "000001.tar").read_bytes()
    (shards / "000001.tar").write_bytes(data[: len(data) // 2])
    (shards / "000009.tar").write_bytes(data)
    assert main(["shards", "verify", str(shards), "--workers", "1"]) == 1
    said = capsys.readouterr().err
    for problem in (
        "000000.tar: has 4 samples, dataset.json says 2",
        "000000.tar: its checksum is not that in dataset.json",
        "000000.tar: a: no image",
        "000000.tar: b: no label",
        "000000.tar: c: label values [7] are above 2",
        "000000.tar: d: the label is 5x4, the image is 4x4",
        "000001.tar",
        "000009.tar: is not listed in dataset.json",
    ):
        assert problem in said
    (shards / "000001.tar").unlink()
    main(["shards", "verify", str(shards), "--workers", "1"])
    assert "000001.tar: is listed in dataset.json, but missing" in capsys.readouterr().err
    assert main(["shards", "verify", str(shards / "nowhere"), "--workers", "1"]) == 1


def png(values):
    buffer = io.BytesIO()
    Image.fromarray(values.astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def test_a_shard_of_another_data_set_is_refused(tmp_path, capsys, shards):
    fake_voc(tmp_path / "voc")
    argv = ["shards", "voc", "--source", str(tmp_path / "voc"), "--output", str(shards)]
    assert main(argv) == 1
    assert "choose another --output" in capsys.readouterr().err


def test_img2dataset_shards_are_read_as_they_are(tmp_path):
    with tarfile.open(tmp_path / "00000.tar", "w") as tar:
        for key in ("000000", "000003", "000002"):
            for ending, data in (
                ("jpg", png(np.zeros((6, 6, 3)))),  # its sniffed format counts, not its name
                ("txt", f"caption of {key}".encode()),
                ("json", json.dumps({"key": key}).encode()),
            ):
                member = tarfile.TarInfo(f"{key}.{ending}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    (tmp_path / "00000_stats.json").write_text('{"count": 4, "successes": 3}')
    data = GCC3M(str(tmp_path), num_workers=0, image_size=8)
    assert data.sample_counts() == {"00000": 3}
    (batch,) = data.loader()
    assert batch.keys == ["000000", "000003", "000002"]
    assert batch.samples[1].caption == "caption of 000003"
    assert [sample.label for sample in batch.samples] == [None] * 3
    assert GCC3M(str(tmp_path), names=["cat"]).info.classes == ("cat",)


def killed_after(folder: Path, words: list[str], name: str) -> None:
    """Run a command in a process of its own, and kill it when it has made a file."""
    process = subprocess.Popen([sys.executable, "-m", "tasks", *words], cwd=ROOT)
    try:
        deadline = time.time() + FOREVER
        while not (folder / name).exists() and process.poll() is None and time.time() < deadline:
            time.sleep(0.002)
    finally:
        process.kill()
        process.wait()
    assert (folder / name).exists()
    assert len(list(folder.glob("*.tar"))) < 200


@pytest.mark.processes
def test_a_half_made_data_set_is_no_data_set_until_it_is_whole(tmp_path, tiny_run, capsys):
    folder = tmp_path / "out"
    words = ["shards", "shapes", "--count", "200", "--shard-size", "1", "--size", "64"]
    words += ["--output", str(folder), "--workers", "1"]
    killed_after(folder, words, "000002.tar")
    assert main(["shards", "verify", str(folder), "--workers", "1"]) == 1
    assert "half made" in capsys.readouterr().err
    assert tiny_run(folder, tmp_path / "run") == 1
    said = capsys.readouterr().err
    assert "half made" in said
    assert "of 200 shards" in said
    assert not (tmp_path / "run" / "metrics.json").exists()
    before = (folder / "000000.tar").stat().st_mtime_ns
    assert main(words) == 0
    assert (folder / "000000.tar").stat().st_mtime_ns == before
    assert tiny_run(folder, tmp_path / "run") == 0
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["images"] == 200


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny.json"
    path.write_text(json.dumps(TINY))
    return path


@pytest.fixture
def tiny_run(tiny):
    """Predict on a folder of shards; returns the exit code."""

    def run(shards: Path, output: Path, *more: str) -> int:
        words = ["predict", "--model", "Recognition", "--data", "Shapes"]
        words += [f"--data.shards={shards}", f"--model.backbone.model={tiny}"]
        words += ["--model.backbone.pretrained=null", "--trainer.accelerator=cpu"]
        words += ["--data.num_workers=0", "--trainer.enable_progress_bar=false"]
        return main([*words, f"--writer.output={output}", *more])

    return run


def test_another_option_leaves_no_description_of_the_old_shards_behind(tmp_path, capsys):
    fake_coco(tmp_path / "in")
    words = ["shards", "coco", "--source", str(tmp_path / "in"), "--workers", "1"]
    words += ["--output", str(tmp_path / "out"), "--shard-size", "1"]
    assert main(words) == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datamodules._convert._write_shard", stop)
        with pytest.raises(KeyboardInterrupt):
            main([*words, "--crowd", "foreground"])
    assert main(["shards", "verify", str(tmp_path / "out"), "--workers", "1"]) == 1
    assert "half made (3 of 3 shards" in capsys.readouterr().err


def stop(*_):
    raise KeyboardInterrupt


@pytest.mark.processes
def test_two_conversions_into_one_folder_make_one_data_set(tmp_path):
    words = ["shards", "shapes", "--count", "60", "--shard-size", "4", "--size", "96"]
    words += ["--workers", "1", "--output"]
    assert main([*words, str(tmp_path / "alone")]) == 0
    both = [
        subprocess.Popen([sys.executable, "-m", "tasks", *words, str(tmp_path / "both")], cwd=ROOT)
        for _ in range(2)
    ]
    assert [process.wait(timeout=FOREVER) for process in both] == [0, 0]
    assert checksums(tmp_path / "both") == checksums(tmp_path / "alone")
    assert not list((tmp_path / "both").glob("*.partial"))


def test_a_strangers_tars_are_not_touched(tmp_path, tiny_run, capsys):
    """Neither deleted as stale shards, nor taken for a place where nothing is yet."""
    folder = tmp_path / "theirs"
    folder.mkdir()
    (folder / "00000.tar").write_bytes(b"years of downloads")
    (folder / "00001.tar.part.partial").write_bytes(b"under way")
    words = ["shards", "shapes", "--count", "3", "--size", "64", "--workers", "1"]
    assert main([*words, "--output", str(folder)]) == 1
    assert "holds 00000.tar, which is no shard made here" in capsys.readouterr().err
    assert sorted(p.name for p in folder.glob("[!.]*")) == ["00000.tar", "00001.tar.part.partial"]
    (folder / "00000.tar").rename(folder / "00000.tar.bz2")
    assert tiny_run(folder, tmp_path / "run", "--data.scenes=3", "--data.scene_size=64") == 1
    assert "no shards at" in capsys.readouterr().err
    assert not list(folder.glob("*.tar"))


def test_a_picture_that_would_run_ghostscript_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", None)  # calling it would be another error
    source = toy(tmp_path / "in", 2)
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\n{} loop\n"
    (tmp_path / "in" / "001.png").write_bytes(eps)
    described = write_shards(source, tmp_path / "out", workers=1)
    ((key, reason),) = described["bad"]
    assert key == "001"
    assert "it is of the format EPS, which is not opened" in reason


def test_packed_shards_in_a_folder_are_the_data(tmp_path, tiny_run):
    words = ["shards", "shapes", "--count", "3", "--size", "64", "--workers", "1"]
    assert main([*words, "--output", str(tmp_path / "plain")]) == 0
    folder = tmp_path / "packed"
    folder.mkdir()
    packed = gzip.compress((tmp_path / "plain" / "000000.tar").read_bytes())
    (folder / "000000.tar.gz").write_bytes(packed)
    assert tiny_run(folder, tmp_path / "run") == 0
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["images"] == 3
    assert not list(folder.glob("*.tar"))


@pytest.mark.parametrize("text", ["[]", "null", '{"shards": 3}', '{"shards": [{"name": 1}]}', "{"])
def test_a_description_that_is_none_is_named(text, shards, tiny_run, tmp_path, capsys):
    (shards / "dataset.json").write_text(text)
    assert main(["shards", "verify", str(shards), "--workers", "1"]) == 1
    assert "dataset.json is not valid" in capsys.readouterr().err
    assert tiny_run(shards, tmp_path / "run") == 1
    assert "dataset.json is not valid" in capsys.readouterr().err


def test_verify_of_nothing_says_so(tmp_path, capsys):
    (tmp_path / "none").mkdir()
    assert main(["shards", "verify", str(tmp_path / "none")]) == 1
    assert "holds no *.tar" in capsys.readouterr().err
    (tmp_path / "none" / "dataset.json").write_text('{"dataset": "voc", "shards": []}')
    assert main(["shards", "verify", str(tmp_path / "none")]) == 1
    assert "holds no *.tar" in capsys.readouterr().err
    (tmp_path / "none" / "dataset.json").unlink()
    tarfile.open(tmp_path / "none" / "0.tar", "w").close()
    assert main(["shards", "verify", str(tmp_path / "none"), "--workers", "1"]) == 1
    assert "not one sample" in capsys.readouterr().err


@pytest.mark.processes
def test_a_world_whose_drawing_was_killed_is_drawn_to_its_end(tmp_path, tiny, tiny_run, capsys):
    folder = tmp_path / "world"
    fields = ["--data.scenes=150", "--data.scene_size=64", "--data.scenes_per_shard=1"]
    words = ["predict", "--model=Recognition", "--data=Shapes", f"--data.shards={folder}", *fields]
    words += [f"--model.backbone.model={tiny}", "--model.backbone.pretrained=null"]
    words += [f"--writer.output={tmp_path / 'other'}"]
    killed_after(folder, words, "000002.tar")
    assert tiny_run(folder, tmp_path / "run") == 1  # other scenes: not those that were begun
    assert "half made" in capsys.readouterr().err
    assert tiny_run(folder, tmp_path / "run", *fields) == 0
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["images"] == 150


def test_a_world_of_other_scenes_than_asked_for_is_refused(tmp_path, tiny_run, capsys):
    words = ["shards", "shapes", "--count", "3", "--size", "64", "--seed", "4", "--workers", "1"]
    assert main([*words, "--output", str(tmp_path / "w")]) == 0
    for field in ("scenes=4", "seed=2026", "scene_size=96"):
        assert tiny_run(tmp_path / "w", tmp_path / "run", f"--data.{field}") == 1
        said = capsys.readouterr().err
        assert "holds 3 scenes, seed 4, 64 px, not" in said
    fields = ["--data.scenes=3", "--data.seed=4", "--data.scene_size=64"]
    assert tiny_run(tmp_path / "w", tmp_path / "run", *fields) == 0
