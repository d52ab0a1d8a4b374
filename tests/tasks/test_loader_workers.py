"""Loader workers that are killed, fail, stall, or can not hand over their batches."""

import errno
import multiprocessing
import os
import signal
import tempfile
import time

import pytest

from datamodules import _loader
from datamodules._decode import Decoder
from datamodules._shards import ShardStream
from tasks.__main__ import main
from tests.tasks.conftest import fail_once, same_results


def test_a_loader_worker_that_is_killed(finished, command, monkeypatch, tmp_path, capsys):
    run = tmp_path / "run"
    decode = Decoder.__call__

    def die(self, entry):
        if entry.key == "00000013":
            os.kill(os.getpid(), signal.SIGKILL)
        return decode(self, entry)

    with monkeypatch.context() as patch:
        patch.setattr(Decoder, "__call__", die)
        assert main(command(run, "--data.num_workers=2")) == 1
    assert "a loader worker was killed" in capsys.readouterr().err
    assert not (run / "000002.tar").exists()
    assert main(command(run)) == 0
    assert same_results(finished, run)


def test_an_exception_in_a_loader_worker_is_told_as_it_is(command, monkeypatch, tmp_path, capsys):
    words = command(tmp_path / "run", "--data.num_workers=1")
    full = OSError(errno.ENOSPC, "No space left on device")
    with monkeypatch.context() as patch:
        fail_once(patch, ShardStream, "_batch", full, after=2)
        assert main(words) == 1
    told = capsys.readouterr().err
    assert "disk is full" in told
    assert "memory" not in told
    fail_once(monkeypatch, ShardStream, "_batch", RuntimeError("a fault of ours"), after=2)
    with pytest.raises(RuntimeError, match=r"^a fault of ours$"):
        main(words)


def test_a_batch_for_which_there_is_no_shared_memory(command, monkeypatch, tmp_path, capsys):
    resource = pytest.importorskip("resource")
    batch = ShardStream._batch

    def narrow(*args):
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))  # in the worker
        return batch(*args)

    monkeypatch.setattr(ShardStream, "_batch", narrow)
    assert main(command(tmp_path / "run", "--data.num_workers=1")) == 1
    told = capsys.readouterr().err
    assert "could not hand over a batch" in told
    assert "--data.num_workers 0" in told


def test_a_batch_for_which_there_is_no_socket(command, monkeypatch, tmp_path, capsys):
    far = tmp_path / ("x" * 120)
    far.mkdir()
    monkeypatch.delitem(multiprocessing.current_process()._config, "tempdir", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(far))
    assert main(command(tmp_path / "run", "--data.num_workers=1")) == 1
    told = capsys.readouterr().err
    assert "could not hand over a batch" in told
    assert f"set TMPDIR, {far}, to a shorter path" in told


def test_a_loader_worker_that_stalls(command, monkeypatch, tmp_path, capsys, caplog):
    decode = Decoder.__call__

    def stall(self, entry):
        while entry.key == "00000013":
            time.sleep(1)
        return decode(self, entry)

    monkeypatch.setattr(Decoder, "__call__", stall)
    monkeypatch.setattr(_loader, "NOTICE", 1.0)
    words = command(tmp_path / "run", "--data.num_workers=1", "--data.timeout=0.3")
    assert main(words) == 1
    assert "waiting 1 s for the first batch of shard 000002" in caplog.text
    told = capsys.readouterr().err
    assert "nothing came for 3 s" in told
    assert "--data.timeout" in told
