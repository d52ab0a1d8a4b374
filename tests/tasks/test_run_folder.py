"""tasks.Run: read back without Lightning or weights; opened by one job at a time; replaced at the end."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import lock_descriptor

from common import signals
from datamodules._samples import DatasetInfo, SampleError
from tasks import Run
from tasks.__main__ import main
from tasks.run import (
    ImageResult,
    LabelMap,
    Masks,
    Points,
    RunError,
    Scores,
    Similarities,
    Tokens,
    callback,
    shard,
)
from tasks.run.lock import FolderLock, Job
from tests.tasks.conftest import FOREVER, same_results

INFO = DatasetInfo("shapes", ("cat", "a dog"))


def described(**identity):
    info = {"name": "shapes", "classes": ["cat", "a dog"]}
    settings = {"task": {"class": "Mine"}, "writer": {"layout": "tar"}, **identity}
    return {"identity": settings, "shards": ["a", "b"], "contents": {}, "info": info}


def begin(path: Path, overwrite: bool = False, **identity) -> Run:
    run = Run.open(path, described(**identity), mine=["a", "b"], overwrite=overwrite)
    run.accept(["a", "b"], {"identity": {"weights": "w"}})
    return run


def publish(run: Run, name: str, images: int = 3) -> None:
    out = run.shard(name)
    for i in range(images):
        values = np.full((2, 3), i, np.uint8)
        out.add([ImageResult(f"{name}{i}", (LabelMap(values, {"cat": 1.0}),))])
    out.errors.append(SampleError(name, "x", "broken"))
    out.publish({"m.total": torch.ones(2)})


def test_reading_a_run_imports_neither_lightning_nor_open_clip(finished):
    code = (
        "import sys, tasks; run = tasks.Run.load(sys.argv[1]); "
        "print(run.metrics, run.per_class, run.settings, run.errors, len(list(run.images()))); "
        "heavy = {'lightning', 'open_clip', 'torchmetrics', 'matplotlib', 'transformers'}; "
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    command = [sys.executable, "-c", code, str(finished)]
    subprocess.run(command, check=True, timeout=FOREVER)


def test_merging_a_run_needs_no_lightning(finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    code = (
        "import sys, tasks; tasks.Run.load(sys.argv[1]).summarise(); "
        "assert not {'lightning', 'open_clip'} & set(sys.modules)"
    )
    (run / "metrics.json").unlink()
    subprocess.run([sys.executable, "-c", code, str(run)], check=True, timeout=FOREVER)
    assert (run / "metrics.json").read_bytes() == (finished / "metrics.json").read_bytes()


@pytest.mark.parametrize("layout", ["tar", "files"])
def test_results_come_back_as_they_were_written(predict, tmp_path, layout):
    words = (f"--writer.layout={layout}", "--writer.overlays=true")
    run = Run.load(predict(tmp_path / "run", *words))
    assert run.metrics == json.loads((run.folder / "metrics.json").read_text())["metrics"]
    assert run.settings["task"]["class"] == "Explainability"
    assert set(run.per_class) == set(run.info.classes)
    assert run.errors == []
    images = list(run.images())
    assert [image.key for image in images] == [f"{i:08d}" for i in range(20)]
    image = images[7]
    masks, similarities = image.get(Masks), image.get(Similarities)
    height, width = image.record["size"]
    assert masks.masks.shape == (len(masks.names), height, width)
    assert masks.masks.dtype == bool
    own = image.record["methods"]["surgery"]
    assert list(masks.names) == list(own["labels"])
    assert [run.info.classes[number] for number in masks.numbers] == list(masks.names)
    assert similarities.values.shape == (len(run.info.classes), *own["grid"])
    assert len(image.pictures) == len(masks.names)
    assert image.get(LabelMap) is None
    assert image.methods == ["surgery"]
    assert np.array_equal(image.get(Masks, "surgery").masks, masks.masks)
    # Read and written again, an image is the same.
    again = ImageResult(image.key, image.results).encode(run.info)
    assert {**again, **image.pictures} == dict(image.stored.files) | {"json": again["json"]}
    assert json.loads(again["json"]) == image.record


@pytest.mark.parametrize(
    ("task", "kind"),
    [
        ("Segmentation", LabelMap),
        ("Recognition", Scores),
        ("Interactive", Points),
        ("Multimodal", Tokens),
    ],
)
@pytest.mark.parametrize("layout", ["tar", "files"])
def test_every_tasks_results_come_back(predict, scenes, tmp_path, task, kind, layout):
    words = (f"--data.shards={scenes}/000003.tar", f"--writer.layout={layout}")
    run = Run.load(predict(tmp_path / "run", *words, task=task))
    (first, _) = run.images()
    found = first.get(kind)
    assert found is not None
    stored = {k: v for k, v in first.stored.files.items() if k != "json"}
    assert {k: v for k, v in ImageResult("", (found,)).encode(run.info).items() if k in stored} == {
        k: v for k, v in stored.items() if kind is not Tokens
    }
    inner = first.record["methods"][first.methods[0]] if first.methods else first.record
    assert found.record(first.key).items() <= inner.items()
    rows = {
        name: dict(zip(row.names, row.values, strict=True)) for name, row in found.rows().items()
    }
    assert rows == {
        name: {k: pytest.approx(v) if kind is Scores else v for k, v in row.items() if k != "key"}
        for name, row in first.stored.rows.items()
    }


def test_sam_masks_and_a_class_without_a_value_of_its_own():
    info = DatasetInfo("roads", ("road", "car"), zero_is_background=False)
    mask = np.array([[True, False]])
    files = Masks(["road", "car"], [0, 1], np.stack([mask, ~mask])).files(info)
    assert files["mask.000-road.png"].tolist() == [[0, 255]]
    assert files["mask.001-car.png"].tolist() == [[255, 1]]


def test_no_run_and_broken_ones(tmp_path, capsys):
    for text, said in (
        (None, "not a run's folder"),
        ('{"identity": {"ta', "can't be read"),
        ("[1, 2]", "does not describe a run"),
        ("null", "does not describe a run"),
        ('{"shards": []}', "does not describe a run"),
    ):
        if text is not None:
            (tmp_path / "run.json").write_text(text)
        assert main(["metrics", str(tmp_path)]) == 1
        shown = capsys.readouterr().err
        assert said in shown
        assert "run.json" in shown
        assert "--writer.overwrite true" in shown or text is None


def test_a_broken_run_json_is_told_by_predict_too(finished, command, tmp_path, capsys):
    run = shutil.copytree(finished, tmp_path / "run")
    text = (run / "run.json").read_text()
    (run / "run.json").write_text(text[: len(text) // 2])
    assert main(command(run)) == 1
    assert f"{run}/run.json can't be read" in capsys.readouterr().err
    assert main(command(run, "--writer.overwrite=true")) == 0
    assert same_results(finished, run)


def test_an_unfinished_run_has_no_summary(tmp_path):
    run = begin(tmp_path / "run")
    publish(run, "a")
    run.close()
    again = Run.load(tmp_path / "run")
    assert [image.key for image in again.images()] == ["a0", "a1", "a2"]
    for what in ("metrics", "errors"):
        with pytest.raises(RunError, match="lightning metrics"):
            getattr(again, what)


# ---- one job at a time


def test_a_second_job_is_told_who_has_the_folder(finished, command, tmp_path, capsys):
    run = shutil.copytree(finished, tmp_path / "run")
    (run / "000001.tar").unlink()
    partial = run / ".000001.tar.123.partial"
    partial.write_bytes(b"being written")
    lock = FolderLock(run, Job.this(0, 1))
    for more in ((), ("--writer.overwrite=true",), ("--data.part=1", "--data.parts=2")):
        assert main(command(run, *more)) == 1
        shown = capsys.readouterr().err
        assert "in use by another job" in shown
        assert f"process {os.getpid()} on " in shown
    assert partial.exists()
    assert (run / "000000.tar").exists()
    lock.release()
    assert main(command(run)) == 0
    assert same_results(finished, run)
    assert not list(run.glob(".*"))


def test_parts_share_a_folder_and_overlapping_ones_do_not(tmp_path):
    def enter(part, parts, alone=False):
        return FolderLock(tmp_path, Job.this(part, parts), alone=alone)

    first, second = enter(0, 2), enter(3, 4)
    for part, parts in ((0, 2), (0, 1), (2, 4), (1, 2), (0, 3)):
        with pytest.raises(RunError, match="in use"):
            enter(part, parts)
    with pytest.raises(RunError, match=r"part 0 of 2|part 3 of 4"):
        enter(1, 4, alone=True)
    enter(1, 4).release()
    first.release()
    second.release()
    assert not list(tmp_path.iterdir())


def test_what_killed_jobs_left_goes_when_another_begins_and_when_it_ends(tmp_path):
    def leave(*names):
        for name in names:
            (tmp_path / name).write_text("{}")

    leave(".job-1", ".job-2.partial")
    lock = FolderLock(tmp_path, Job.this(0, 2))
    assert list(tmp_path.iterdir()) == [lock.path]
    leave(".job-3", ".job-4.partial")
    other = FolderLock(tmp_path, Job.this(1, 2))
    lock.release()
    assert list(tmp_path.iterdir()) == [other.path]
    leave(".job-5", ".job-6.partial")
    other.release()
    assert not list(tmp_path.iterdir())


def test_a_lock_that_was_taken_for_a_dead_jobs_is_made_anew(tmp_path, monkeypatch):
    first = FolderLock(tmp_path, Job.this(0, 2))
    calls = []

    def late(file, *, blocking):
        calls.append(file)
        if len(calls) == 1:  # between making the file and locking it, another job looks around
            first.others()
        return lock_descriptor(file, blocking=blocking)

    monkeypatch.setattr("tasks.run.lock.lock_descriptor", late)
    second = FolderLock(tmp_path, Job.this(1, 2))
    assert {*tmp_path.iterdir()} == {first.path, second.path}
    assert len(first.others()) == 1
    with pytest.raises(RunError, match="in use"):
        FolderLock(tmp_path, Job.this(1, 2))


@pytest.mark.processes
def test_a_lock_dies_with_its_process(tmp_path):
    code = (
        "import os, sys, time; from pathlib import Path; from tasks.run.lock import FolderLock, Job; "
        "FolderLock(Path(sys.argv[1]), Job.this(0, 1)); "
        "os.fork() or time.sleep(60); print('held', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, start_new_session=True
    )
    try:
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(RunError, match=f"process {process.pid}"):
            FolderLock(tmp_path, Job.this(0, 1))
        process.kill()
        process.wait(FOREVER)
        FolderLock(tmp_path, Job.this(0, 1)).release()  # though a child of it is alive
    finally:
        os.killpg(process.pid, 9)
        process.wait(FOREVER)
    assert not list(tmp_path.iterdir())


# ---- replaced at the end


@pytest.mark.parametrize(
    "wrong",
    [
        "--model.text_features=nowhere.safetensors",
        "--model.backbone.pretrained=nowhere.pt",
        "--data.batch_size=0",
        "--model.prob_thd=0.5",
    ],
)
def test_an_old_run_outlives_a_new_one_that_is_refused(finished, command, tmp_path, wrong):
    run = shutil.copytree(finished, tmp_path / "run")
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    words = command(run, "--writer.overwrite=true", wrong)
    if "prob_thd" in wrong:
        words = command(run, "--writer.overwrite=true", "--model.tile=5", task="Multimodal")
    try:
        code = main(words)
    except SystemExit as error:
        code = error.code
    assert code != 0
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


@pytest.mark.parametrize("steps", range(6))
def test_a_crash_while_replacing_loses_nothing(tmp_path, monkeypatch, steps):
    """After any number of renames: the old run is there as a whole, or it is gone as it should be."""
    path = tmp_path / "run"
    old = begin(path)
    publish(old, "a")
    publish(old, "b")
    old.close()
    rename, calls = Path.rename, []

    def crash(self, target):
        if ".job-" not in self.name:
            calls.append(self)
            if len(calls) > steps:
                raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", crash)
        new = Run.open(path, described(more=1), mine=["a", "b"], overwrite=True)
        try:
            new.accept(["a", "b"], {})
        except KeyboardInterrupt:
            interrupted = True
        else:
            interrupted = False
        new.close()
    if interrupted:
        again = Run.open(path, described(), mine=["a", "b"])
        assert again.finished == ["a", "b"]
        again.close()
        again = Run.open(path, described(more=1), mine=["a", "b"], overwrite=True)
        again.accept(["a", "b"], {})
        again.close()
    assert [p.name for p in path.iterdir()] == ["run.json"]
    assert Run.load(path).settings["more"] == 1


# ---- what is published


@pytest.mark.parametrize("kept", [0.3, 0.7, 0.99])
def test_an_output_tar_that_was_cut_off_is_done_again(finished, predict, tmp_path, caplog, kept):
    run = shutil.copytree(finished, tmp_path / "run")
    data = (run / "000001.tar").read_bytes()
    (run / "000001.tar").write_bytes(data[: int(len(data) * kept)])
    predict(run)
    assert "000001.tar is not a complete output shard" in caplog.text
    assert "done again" in caplog.text
    assert same_results(finished, run)


def test_a_record_is_read_from_the_tail_however_long(tmp_path):
    run = begin(tmp_path / "run")
    out = run.shard("a")
    out.errors += [SampleError("a", f"k{i}", "é" * 90) for i in range(3000)]  # more than one look
    out.publish({"m.total": torch.arange(70000)})
    run.close()
    record, states = shard.load_states(tmp_path / "run" / "a.tar")
    assert len(record.errors) == 3000
    assert states["m.total"].equal(torch.arange(70000))
    with tarfile.open(tmp_path / "run" / "a.tar") as tar:
        assert tar.getnames() == [shard.STATES, shard.RECORD]


def test_a_stop_in_the_last_batch_of_a_shard_publishes_it_first(
    finished, command, monkeypatch, tmp_path, capsys
):
    run = tmp_path / "run"
    write = callback.ResultWriter._write

    def write_and_stop(self, task, prediction, batch):
        if batch.shard == "000001" and batch.last:
            patch.setattr(signals, "reason", lambda: signals.Stopped(signal.SIGTERM))
        write(self, task, prediction, batch)

    with monkeypatch.context() as patch:
        patch.setattr(callback.ResultWriter, "_write", write_and_stop)
        assert main(command(run)) == 143
    assert "stopped by SIGTERM" in capsys.readouterr().err
    assert sorted(p.name for p in run.glob("*.tar")) == ["000000.tar", "000001.tar"]
    assert not list(run.glob(".*"))
    assert main(command(run)) == 0
    assert same_results(finished, run)
