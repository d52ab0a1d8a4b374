"""Runs: published whole or not at all, resumed, refused, the same for any number of processes."""

import json
import os
import shutil
import tarfile
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image

from datamodules._samples import SampleError
from surgery import softmax_attention
from tasks.__main__ import main
from tasks.run.tally import Tally
from tests.tasks.conftest import TINY, add, same_results, with_broken_sample


def test_a_run_goes_on_with_what_is_missing(finished, predict, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    (run / "000001.tar").unlink()
    (run / "metrics.json").unlink()
    (run / ".000001.tar.123.partial").write_bytes(b"left by a killed process")
    kept = (run / "000000.tar").stat().st_mtime_ns
    predict(run)
    assert same_results(finished, run)
    assert (run / "000000.tar").stat().st_mtime_ns == kept
    assert not list(run.glob(".*"))


def test_loader_workers_change_nothing(finished, predict, tmp_path):
    assert same_results(finished, predict(tmp_path / "workers", "--data.num_workers=3"))


@pytest.mark.parametrize(("first", "later"), [(1.0, 0.1), (0.1, 1.0)])
def test_later_jobs_take_the_attention_of_the_first(first, later, command, tmp_path, monkeypatch):
    words = command(tmp_path / "run", "--trainer.precision=bf16-mixed")
    attention = []
    for ratio in (first, later):
        monkeypatch.setattr(softmax_attention, "_chosen", {})  # as in a process of its own
        monkeypatch.setattr(softmax_attention, "ratio", lambda dtype, found=ratio: found)
        assert main(words) == 0
        (tmp_path / "run" / "000001.tar").unlink()
        device = json.loads((tmp_path / "run" / "run.json").read_text())["device"]
        attention.append((device["attention"], softmax_attention.by_products(torch.bfloat16)))
    assert attention == [("fused", False) if first == 1.0 else ("products", True)] * 2


def test_a_compiled_backbone_needs_a_compiler(command, tmp_path, monkeypatch, capsys):
    from torch._inductor import config

    monkeypatch.setattr(config.cpp, "cxx", (None, "/nowhere/g++"))
    monkeypatch.setattr(config, "force_disable_caches", True)
    monkeypatch.setattr(config, "compile_threads", 1)  # else it starts processes for it
    small = tmp_path / "small.json"
    small.write_text(json.dumps({**TINY, "vision_cfg": {**TINY["vision_cfg"], "layers": 1}}))
    words = (f"--model.backbone.model={small}", "--model.backbone.attention=raw")
    assert main(command(tmp_path / "run", *words, "--model.backbone.compile=true")) == 1
    assert "--model.backbone.compile false needs none" in capsys.readouterr().err


def test_compiling_is_for_images_of_one_size(command, tmp_path, capsys):
    words = ("--model.backbone.compile=true", "--data.resize=short_side")
    assert main(command(tmp_path / "run", *words)) == 1
    assert "--data.resize at squash" in capsys.readouterr().err


def test_another_setting_is_refused_until_told_otherwise(finished, command, tmp_path, capsys):
    run = shutil.copytree(finished, tmp_path / "run")
    assert main(command(run, "--model.threshold=0.4")) == 1
    assert "--model.threshold: 0.5 there, 0.4 now" in capsys.readouterr().err
    assert same_results(finished, run)
    assert main(command(run, "--model.threshold=0.4", "--writer.overwrite=true")) == 0
    assert not same_results(finished, run)


def test_other_weights_are_refused(finished, command, tiny, tmp_path, capsys):
    run = shutil.copytree(finished, tmp_path / "run")
    other = tmp_path / "tiny.json"
    config = json.loads(tiny.read_text())
    config["text_cfg"]["layers"] = 3
    other.write_text(json.dumps(config))
    described = json.loads((run / "run.json").read_text())
    described["identity"]["task"]["backbone"]["model"] = str(other)
    (run / "run.json").write_text(json.dumps(described))
    assert main(command(run, f"--model.backbone.model={other}")) == 1
    assert "the weights are others" in capsys.readouterr().err


def test_other_content_under_the_same_names_is_refused(finished, scenes, command, tmp_path, capsys):
    shards = shutil.copytree(scenes, tmp_path / "shards")
    shutil.copy(shards / "000001.tar", shards / "000000.tar")
    run = shutil.copytree(finished, tmp_path / "run")
    assert main(command(run, f"--data.shards={shards}")) == 1
    assert "the pictures of shard 000000 have changed" in capsys.readouterr().err
    (run / "000000.tar").unlink()
    assert main(command(run, f"--data.shards={shards}")) == 0


def undescribe(shards: Path) -> None:
    """Leave nothing but the tars."""
    for path in shards.glob("*.json"):
        path.unlink()


@pytest.mark.parametrize("listed", [True, False])
def test_one_byte_that_changed_in_a_shard(listed, finished, scenes, command, tmp_path, capsys):
    shards = shutil.copytree(scenes, tmp_path / "shards")
    if not listed:
        undescribe(shards)
    words = command(tmp_path / "run", f"--data.shards={shards}")
    assert main(words) == 0
    with open(shards / "000001.tar", "r+b") as file:
        file.seek(900)  # inside the first picture: the size stays, and so do all headers
        (byte,) = file.read(1)
        file.seek(900)
        file.write(bytes([byte ^ 255]))
    assert main(words) == 1
    assert "the pictures of shard 000001 have changed" in capsys.readouterr().err


@pytest.mark.parametrize("listed", [True, False])
def test_shards_that_were_copied_are_the_same(listed, scenes, command, tmp_path):
    """To another disk, with another time of modification."""
    shards = shutil.copytree(scenes, tmp_path / "shards")
    if not listed:
        undescribe(shards)
    assert main(command(tmp_path / "run", f"--data.shards={shards}")) == 0
    copies = shutil.copytree(shards, tmp_path / "copies", copy_function=shutil.copyfile)
    for number, path in enumerate(sorted(copies.glob("*.tar"))):
        os.utime(path, (number, number))
    assert main(command(tmp_path / "run", f"--data.shards={copies}")) == 0


def test_a_picture_that_changed_under_the_same_size(command, tmp_path, capsys):
    photos = tmp_path / "photos"
    photos.mkdir()
    for i, colour in enumerate(("red", "green")):
        Image.new("RGB", (60, 60), colour).save(photos / f"{i}.bmp")
    data = ["--data=Images", f"--data.path={photos}", "--data.names=[cat, dog]"]
    words = command(tmp_path / "run", *data)
    assert main(words) == 0
    assert main(words) == 0
    Image.new("RGB", (60, 60), "blue").save(photos / "1.bmp")
    assert main(words) == 1
    assert "the pictures of shard images-00000 have changed" in capsys.readouterr().err


def test_metrics_of_a_garbled_shard(finished, tmp_path, capsys):
    run = shutil.copytree(finished, tmp_path / "run")
    with tarfile.open(run / "000001.tar", "w") as tar:
        add(tar, "__shard__/record.json", b"{}")
        add(tar, "__shard__/metrics.safetensors", b"")
    assert main(["metrics", str(run)]) == 1
    assert "000001.tar is not a complete output shard" in capsys.readouterr().err


def test_a_strangers_folder_is_not_written_to(command, tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("all my work")
    assert main(command(tmp_path, "--writer.overwrite=true")) == 1
    assert "not a run of ours" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_bad_sample_is_listed_and_the_rest_processed(scenes, predict, tmp_path):
    folder = with_broken_sample(scenes, tmp_path / "shards")
    run = predict(tmp_path / "run", f"--data.shards={folder}")
    (error,) = map(json.loads, (run / "errors.jsonl").read_text().splitlines())
    assert (error["shard"], error["key"]) == ("000000", "00000001")
    assert "trunc" in error["reason"].lower()
    summary = json.loads((run / "metrics.json").read_text())
    assert (summary["images"], summary["errors"]) == (19, 1)


def test_a_bad_sample_can_stop_the_run(scenes, command, tmp_path, capsys):
    folder = with_broken_sample(scenes, tmp_path / "shards")
    run = tmp_path / "run"
    assert main(command(run, f"--data.shards={folder}", "--data.on_error=raise")) == 1
    assert "00000001" in capsys.readouterr().err
    assert not list(run.glob("*.tar"))


def test_what_is_allowed_is_said_with_the_reasons(scenes, predict, tmp_path, capsys):
    folder = with_broken_sample(scenes, tmp_path / "shards")
    predict(tmp_path / "run", f"--data.shards={folder}")
    shown = capsys.readouterr().out
    assert "19 images, 1 errors" in shown
    assert "000000/00000001: " in shown
    assert "allowed by --data.max_error_rate 0.01: 10 bad samples (the share of 1,000" in shown


def test_nothing_but_a_bad_picture_is_no_success(scenes, command, tmp_path, capsys):
    (tmp_path / "cat.jpg").write_bytes(b"not a picture")
    data = ["--data=Images", f"--data.path={tmp_path / 'cat.jpg'}", "--data.names=[cat]"]
    assert main(command(tmp_path / "run", *data)) == 1
    shown = capsys.readouterr()
    assert "none of the 1 samples could be used" in shown.err
    assert "cat: " in shown.out


@pytest.mark.parametrize(("rate", "code"), [(0.01, 1), (0.5, 1), (0.75, 0)])
def test_lost_shards_count_as_shards(scenes, command, tmp_path, capsys, rate, code):
    folder = shutil.copytree(scenes, tmp_path / "shards")
    for name in ("000000", "000001", "000002"):
        (folder / f"{name}.tar").write_bytes(b"no tar")
    undescribe(folder)
    words = command(tmp_path / "run", f"--data.shards={folder}", f"--data.max_error_rate={rate}")
    assert main(words) == code
    shown = capsys.readouterr()
    assert "2 images, 3 errors" in shown.out
    assert "1 of 4 shards" in shown.out
    assert ("3 of 4 shards are missing" in shown.err) == bool(code)
    assert ("3 missing shards" in shown.out) == (not code)


def test_a_part_answers_for_its_own_shards(scenes, command, tmp_path):
    folder = shutil.copytree(scenes, tmp_path / "shards")
    (folder / "000001.tar").write_bytes(b"no tar")
    codes = [
        main(
            command(
                tmp_path / "run", f"--data.shards={folder}", f"--data.part={i}", "--data.parts=2"
            )
        )
        for i in range(2)
    ]
    assert codes == [0, 1]


def test_many_lost_shards_stop_a_run_at_once():
    tally = Tally(0.01, 5000)
    for i in range(51):
        assert not tally.too_much()
        tally.lose(SampleError(f"{i:06d}", "", "no route to host"))
    assert "51 of 5000 shards can't be read" in tally.too_much()
    assert "no route to host" in tally.too_much()
    few = Tally(0.01, 4)
    few.lose(SampleError("000000", "", "no route to host"))
    assert not few.too_much()  # the others are done first
    assert "1 of 4 shards are missing" in few.verdict()


def test_processes_that_stop_together_write_one_summary():
    counts = Counter()

    def count(name: str, amount: int) -> int:
        counts[name] += amount
        return counts[name]

    written = []
    for rank in range(2):
        Tally(0.01, 4, count).stop(lambda rank=rank: written.append(rank))
    assert written == [0]


def test_too_many_bad_samples_stop_the_run(scenes, command, tmp_path, capsys):
    folder = with_broken_sample(scenes, tmp_path / "shards")
    run = tmp_path / "run"
    assert main(command(run, f"--data.shards={folder}", "--data.max_error_rate=0.0001")) == 1
    assert "max_error_rate" in capsys.readouterr().err
    assert [p.name for p in run.glob("*.tar")] == ["000000.tar"]
    assert len((run / "errors.jsonl").read_text().splitlines()) == 1
    # What an earlier job found counts on: a run stops in the same way however often it is started.
    assert main(command(run, f"--data.shards={folder}", "--data.max_error_rate=0.0001")) == 1
    assert "1 of 12 samples are bad" in capsys.readouterr().err
    assert sorted(p.name for p in run.glob("*.tar")) == ["000000.tar", "000001.tar"]
    assert main(command(run, f"--data.shards={folder}")) == 0


def test_a_cut_shard_is_not_published_as_if_complete(scenes, predict, command, tmp_path, capsys):
    folder = shutil.copytree(scenes, tmp_path / "shards")
    data = (scenes / "000001.tar").read_bytes()
    (folder / "000001.tar").write_bytes(data[: len(data) // 2])
    run = tmp_path / "run"
    assert main(command(run, f"--data.shards={folder}")) == 1
    shown = capsys.readouterr()
    assert "1 of 4 shards are missing" in shown.err
    assert "14 images, 1 errors" in shown.out
    assert not (run / "000001.tar").exists()
    (error,) = map(json.loads, (run / "errors.jsonl").read_text().splitlines())
    assert error["shard"] == "000001"
    assert "cut off" in error["reason"]
    assert json.loads((run / "metrics.json").read_text())["shards"] == {"done": 3, "of": 4}
    shutil.copy(scenes / "000001.tar", folder / "000001.tar")
    predict(run, f"--data.shards={folder}")
    assert (run / "000001.tar").exists()
    assert (run / "errors.jsonl").read_text() == ""


def test_a_run_that_was_told_to_end_early(finished, predict, tmp_path):
    run = predict(tmp_path / "run", "--trainer.limit_predict_batches=3")
    assert [p.name for p in run.glob("*.tar")] == ["000000.tar"]
    assert not list(run.glob(".*"))
    assert json.loads((run / "metrics.json").read_text())["shards"] == {"done": 1, "of": 4}
    assert same_results(finished, predict(run))


def test_metrics_can_be_recomputed_from_the_shards(finished, tmp_path, capsys):
    run = shutil.copytree(finished, tmp_path / "run")
    for name in ("metrics.json", "metrics.csv", "errors.jsonl"):
        (run / name).unlink()
    assert main(["metrics", str(run)]) == 0
    assert "mIoU" in capsys.readouterr().out
    for name in ("metrics.json", "metrics.csv", "errors.jsonl"):
        assert (run / name).read_bytes() == (finished / name).read_bytes()


def test_metrics_of_a_run_still_going(finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    (run / "000002.tar").unlink()
    assert main(["metrics", str(run)]) == 0
    summary = json.loads((run / "metrics.json").read_text())
    assert summary["shards"] == {"done": 3, "of": 4}
    assert summary["images"] == 14


def test_metrics_of_no_run(tmp_path, capsys):
    assert main(["metrics", str(tmp_path)]) == 1
    assert "not a run's folder" in capsys.readouterr().err


def test_masks_at_another_threshold_than_the_headline_are_told(finished, capsys):
    assert main(["metrics", str(finished)]) == 0
    details = json.loads((finished / "metrics.json").read_text())["details"]
    said = capsys.readouterr().out
    assert f"best threshold, {details['threshold']:.2f}" in said
    assert f"{100 * details['mIoU_at_fixed_threshold']:.2f} %" in said
