"""Machines that fail a run: full disks, folders that vanish, GPUs with too little memory."""

import errno
import json
import shutil

import pytest
import torch

from surgery.backbone import Backbone
from surgery.towers.vit import ViT
from tasks.__main__ import main
from tasks.run import image, shard
from tests.tasks.conftest import fail_once, same_results


def test_a_full_disk(finished, command, monkeypatch, tmp_path, capsys):
    run = tmp_path / "run"
    full = OSError(errno.ENOSPC, "No space left on device")
    # While an image is encoded, and at the end of a shard, of which the next one hears when it is whole.
    for owner, name, after in ((image, "encode", 30), (shard.OutputShard, "publish", 1)):
        fail_once(monkeypatch, owner, name, full, after=after)
        assert main(command(run)) == 1
        assert "disk is full" in capsys.readouterr().err
        assert [p.name for p in run.glob("*.tar")] == ["000000.tar"]
        assert not list(run.glob(".*"))
    assert main(command(run)) == 0
    assert same_results(finished, run)


def test_an_output_folder_that_can_not_be_written(command, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(command(tmp_path / "file" / "run")) == 1
    assert "file" in capsys.readouterr().err


def test_an_output_folder_that_vanishes(finished, command, monkeypatch, tmp_path, capsys):
    run = tmp_path / "run"
    publish = shard.OutputShard.publish

    def vanish(self, *args):
        shutil.rmtree(run, ignore_errors=True)
        publish(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(shard.OutputShard, "publish", vanish)
        assert main(command(run)) == 1
    assert "run" in capsys.readouterr().err
    assert main(command(run)) == 0
    assert same_results(finished, run)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_batch_too_large_for_the_gpu_goes_in_halves(
    compiled, finished, predict, monkeypatch, tmp_path, caplog
):
    encode = ViT.encode

    def small_only(self, images, *settings):
        if len(images) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return encode(self, images, *settings)

    monkeypatch.setattr("surgery.batches.compiled", lambda encode: encode)
    monkeypatch.setattr(ViT, "encode", small_only)
    run = predict(tmp_path / "run", f"--model.backbone.compile={compiled}")
    # Learned once, in whichever batch came first: 4 images, then 2, and never again.
    assert [r.args[0] for r in caplog.records if "in halves" in r.message] == [4, 2]
    numbers = [json.loads((r / "metrics.json").read_text())["metrics"] for r in (finished, run)]
    assert numbers[1] == pytest.approx(numbers[0], abs=1e-3)


def test_one_image_too_large_for_the_gpu(command, monkeypatch, tmp_path, capsys):
    def never(self, *inputs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Backbone, "encode_image", never)
    assert main(command(tmp_path / "run")) == 1
    assert "--data.image_size" in capsys.readouterr().err
