"""Failures of machines and of data, each provoked; a restart completes the run, with the same files."""

import contextlib
import errno
import functools
import gzip
import http.server
import io
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules import _fetch, _loader
from datamodules._decode import Decoder
from datamodules._shards import ShardStream
from surgery.backbone import Backbone
from surgery.towers.vit import ViT
from tasks.__main__ import main
from tasks.run import processes, results, shard
from tests.tasks.conftest import FOREVER, members, same_results
from tests.tasks.test_runs import add, one_thread


def fail_once(monkeypatch, owner, name, error, *, after: int) -> None:
    """Let the call number ``after`` of ``owner.name`` raise ``error``, and no other."""
    original, calls = getattr(owner, name), []

    @functools.wraps(original)
    def faulty(*args, **kwargs):
        calls.append(1)
        if len(calls) == after:
            raise error
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, faulty)


def test_a_full_disk(finished, command, monkeypatch, tmp_path, capsys):
    run = tmp_path / "run"
    full = OSError(errno.ENOSPC, "No space left on device")
    # While an image is encoded, and at the end of a shard, of which the next one hears when it is whole.
    for owner, name, after in ((results, "encode", 30), (shard.OutputShard, "publish", 1)):
        fail_once(monkeypatch, owner, name, full, after=after)
        assert main(command(run)) == 1
        assert "disk is full" in capsys.readouterr().err
        assert [p.name for p in run.glob("*.tar")] == ["000000.tar"]
        assert not list(run.glob(".*"))
    assert main(command(run)) == 0
    assert same_results(finished, run)


def test_anshard_folder_that_can_not_be_written(command, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(command(tmp_path / "file" / "run")) == 1
    assert "file" in capsys.readouterr().err


def test_anshard_folder_that_vanishes(finished, command, monkeypatch, tmp_path, capsys):
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


class Flaky(http.server.SimpleHTTPRequestHandler):
    """Serves a folder, but the first request for the second shard breaks off; the last is gone."""

    broken: ClassVar[list[str]] = []

    def do_GET(self):
        if "000003" in self.path:
            self.send_error(404)
        elif "000001" in self.path and not self.broken:
            self.broken.append(self.path)
            self.send_response(200)
            self.send_header("Content-Length", "100000")
            self.end_headers()
            self.wfile.write(b"half a shard")
        else:
            super().do_GET()

    def log_message(self, *args):
        pass


def test_remote_shards_are_tried_again_and_then_listed(scenes, predict, monkeypatch, tmp_path):
    monkeypatch.setattr(_fetch, "_pause", lambda stop, seconds: None)
    handler = functools.partial(Flaky, directory=str(scenes))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/{{000000..000003}}.tar"
    run = predict(tmp_path / "run", f"--data.shards={url}", "--data.max_error_rate=0.5")
    server.shutdown()
    assert sorted(p.name for p in run.glob("*.tar")) == ["000000.tar", "000001.tar", "000002.tar"]
    (error,) = map(json.loads, (run / "errors.jsonl").read_text().splitlines())
    assert error["shard"] == "000003"
    assert "could not be fetched" in error["reason"]


def test_a_finished_shard_does_not_wait_for_the_next_one(scenes, predict, tmp_path):
    """The second shard is only sent once the first one's results are there."""
    run = tmp_path / "run"
    seen = []

    class Patient(http.server.SimpleHTTPRequestHandler):
        def do_GET(self):
            if "000001" in self.path:
                deadline = time.monotonic() + FOREVER
                while not (run / "000000.tar").exists() and time.monotonic() < deadline:
                    time.sleep(0.05)
                seen.append((run / "000000.tar").exists())
            super().do_GET()

        def log_message(self, *args):
            pass

    handler = functools.partial(Patient, directory=str(scenes))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/{{000000..000001}}.tar?signature=SECRET"
    predict(run, f"--data.shards={url}", "--data.num_workers=1")
    server.shutdown()
    assert seen == [True]
    stored = [path for path in run.rglob("*") if path.is_file()]
    assert not [path for path in stored if b"SECRET" in path.read_bytes()]


def test_a_packed_shard(scenes, predict, tmp_path):
    packed = tmp_path / "000000.tar.gz"
    packed.write_bytes(gzip.compress((scenes / "000000.tar").read_bytes()))
    run = predict(tmp_path / "run", f"--data.shards={packed}")
    assert json.loads((run / "metrics.json").read_text())["images"] == 6


def test_nothing_a_stranger_put_in_a_shard_runs_or_writes_outside(scenes, predict, tmp_path):
    good = members(scenes / "000000.tar")

    def sample(tar: tarfile.TarFile, key: str, **replaced: bytes) -> None:
        for ending in ("png", "label.png", "json", "txt"):
            data = replaced.get(ending.replace(".", "_"), good[f"00000000.{ending}"])
            add(tar, f"{key}.{ending}", data)

    bomb = io.BytesIO()
    Image.fromarray(np.zeros((1, 1), bool)).resize((20000, 20000)).save(bomb, "PNG")
    wrong = io.BytesIO()
    Image.fromarray(np.full((64, 64), 77, np.uint8)).save(wrong, "PNG")
    small = io.BytesIO()
    Image.fromarray(np.zeros((5, 5), np.uint8)).save(small, "PNG")
    pwned = tmp_path / "PWNED"
    pickled = b"cos\nsystem\n(S'touch " + str(pwned).encode() + b"'\ntR."
    folder = tmp_path / "shards"
    folder.mkdir()
    with tarfile.open(folder / "000000.tar", "w") as tar:
        sample(tar, "good")
        sample(tar, "../up")
        sample(tar, "/abs")
        sample(tar, "a/../../b")
        sample(tar, "__shard__/record")
        sample(tar, "k" * 250)
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        sample(tar, "pickle")
        add(tar, "pickle.pkl", pickled)
        add(tar, "pickle.pyd", pickled)
        sample(tar, "bomb", png=bomb.getvalue())
        sample(tar, "range", label_png=wrong.getvalue())
        sample(tar, "size", label_png=small.getvalue())
        sample(tar, "caption", txt=b"x" * (2 << 20))
        sample(tar, "list", json=b"[1]")
        sample(tar, "notjson", json=b"{")
        sample(tar, "good")
    run = predict(tmp_path / "runs" / "run", f"--data.shards={folder}", "--data.max_error_rate=1")
    listed = [json.loads(line) for line in (run / "errors.jsonl").read_text().splitlines()]
    bad = {error["key"][:8] for error in listed}
    expected = ("../up", "/abs", "a/../../", "__shard_", "k" * 8, "link", "bomb", "range", "size")
    assert bad == {*expected, "caption", "list", "notjson", "good"}
    summary = json.loads((run / "metrics.json").read_text())
    assert (summary["images"], summary["errors"]) == (2, len(listed))
    assert not pwned.exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["runs", "shards"]
    assert {name.split(".")[0] for name in members(run / "000000.tar")} == {
        "good",
        "pickle",
        "__shard__/record",
        "__shard__/metrics",
    }


@pytest.mark.processes
@pytest.mark.parametrize(
    ("number", "ranks", "everybody"),
    [
        (signal.SIGTERM, 1, True),
        (signal.SIGINT, 2, True),
        (signal.SIGUSR1, 2, False),
    ],
)
def test_a_signal_stops_a_run(number, ranks, everybody, finished, command, tmp_path):
    run = tmp_path / "run"
    process = start(command(run, "--data.num_workers=2", *devices(ranks)))
    wait_for(run, process)
    (os.killpg if everybody else os.kill)(process.pid, number)
    _, told = process.communicate(timeout=FOREVER)
    assert process.returncode == (130 if number == signal.SIGINT else 143)
    name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
    assert told.count(f"lightning predict: stopped by {name}") == 1
    assert "Traceback" not in told
    assert "run again to go on" in told
    assert not alive(process.pid)
    assert not list(run.glob(".*"))
    assert len(list(run.glob("*.tar"))) < 4
    assert main(command(run)) == 0
    assert same_results(finished, run)


@pytest.mark.processes
@pytest.mark.parametrize(("ranks", "later"), [(1, 0), (2, 2)])
def test_a_signal_during_the_start(ranks, later, command, tmp_path):
    process = start(command(tmp_path / "run", "--data.num_workers=2", *devices(ranks)))
    while not heeds(process, signal.SIGINT):
        assert process.poll() is None
    time.sleep(later)  # importing, or loading, or waiting for the other: the same must come of it
    os.killpg(process.pid, signal.SIGINT)
    _, told = process.communicate(timeout=FOREVER)
    assert process.returncode == 130
    assert "lightning predict: stopped by Ctrl-C" in told
    assert "Traceback" not in told
    assert not alive(process.pid)


@pytest.mark.processes
@pytest.mark.parametrize(
    ("words", "number"),
    [
        ("shards shapes --count 4000 --shard-size 100 --output", signal.SIGINT),
        ("shards verify", signal.SIGHUP),
    ],
)
def test_a_signal_for_other_commands(words, number, scenes, tmp_path):
    folder = tmp_path / "shards"
    if "verify" in words:
        folder.mkdir()
        for shard in range(20_000):  # minutes of work
            (folder / f"{shard:06d}.tar").hardlink_to(scenes / "000000.tar")
    process = start([*words.split(), str(folder), "--workers", "2"])
    while len(alive(process.pid)) < 3:  # itself and its workers
        assert process.poll() is None
    time.sleep(1)
    os.killpg(process.pid, number)
    _, told = process.communicate(timeout=FOREVER)
    name, code = ("Ctrl-C", 130) if number == signal.SIGINT else ("SIGHUP", 143)
    assert process.returncode == code
    assert f"lightning shards: stopped by {name}" in told
    assert "Traceback" not in told
    while alive(process.pid):
        time.sleep(0.05)


@pytest.mark.processes
@pytest.mark.parametrize("later", [0, 3])
def test_the_others_end_when_the_first_rank_is_killed_during_its_start(later, command, tmp_path):
    process = start(command(tmp_path / "run", *devices(2)))
    while len(alive(process.pid)) < 2:
        assert process.poll() is None
    time.sleep(later)
    process.kill()
    process.communicate(timeout=FOREVER)
    while alive(process.pid):
        time.sleep(0.05)


@pytest.mark.processes
def test_a_rank_that_is_killed_ends_all_others(command, tmp_path):
    """The first one in a batch that never ends, and its loader worker; the last waits for them."""
    run = tmp_path / "run"
    env = {**slowly(), "SLOW_UNTIL": str(tmp_path / "never")}
    process = start(command(run, "--data.num_workers=1", *devices(3)), env)
    while not all((run / f"00000{rank}.tar").exists() for rank in (1, 2)):
        assert process.poll() is None
        time.sleep(0.05)
    victim = min(pid for pid in alive(process.pid) if local_rank(pid) == 1)
    os.kill(victim, signal.SIGKILL)
    _, told = process.communicate(timeout=FOREVER)
    assert process.returncode == 1
    assert told.count("lightning predict: process 1 of the run died of SIGKILL") == 1
    assert "run the same command again" in told
    assert "Traceback" not in told
    while alive(process.pid):
        time.sleep(0.05)


@pytest.mark.processes
def test_sigterm_while_a_rank_waits_for_another(finished, command, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    for name in ("000000.tar", "000003.tar", "metrics.json"):
        (run / name).unlink()
    words = command(run, "--trainer.devices=2", "--trainer.strategy=ddp")
    env = {**slowly(), "SLOW_UNTIL": str(run / "000003.tar")}
    process = subprocess.Popen([sys.executable, "-m", "tasks", *words], env=env)
    while not (run / "000003.tar").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.terminate()
    assert process.wait(FOREVER) == 128 + signal.SIGTERM
    assert not (run / "000000.tar").exists()
    assert main(command(run)) == 0
    assert same_results(finished, run)


def test_a_checkpoint_that_a_training_left_under_slurm(finished, predict, monkeypatch, tmp_path):
    task = {"NTASKS": 1, "JOB_NAME": "job", "JOB_ID": 7, "PROCID": 0, "LOCALID": 0, "NODEID": 0}
    for name, value in task.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    monkeypatch.chdir(tmp_path)
    Path("hpc_ckpt_1.ckpt").write_bytes(b"weights of something else")
    assert same_results(finished, predict(tmp_path / "run"))


def test_a_node_that_does_not_come(command, monkeypatch, tmp_path, capsys, caplog):
    def in_vain(*_, **__):
        time.sleep(0.5)
        raise torch.distributed.DistStoreError("Timed out: 1/2 clients joined")

    monkeypatch.setattr(torch.distributed, "init_process_group", in_vain)
    monkeypatch.setattr(processes, "NOTICE", 0.1)
    words = command(tmp_path / "run", "--trainer.num_nodes=2", "--trainer.strategy=ddp")
    assert main(words) == 1
    assert "for all 2 processes of the run, on 2 nodes" in caplog.text
    assert "didn't find each other (Timed out: 1/2 clients joined)" in capsys.readouterr().err


def test_a_process_that_torchrun_started_again(command, monkeypatch, tmp_path, capsys):
    for name, value in {"USE_AGENT_STORE": "True", "RESTART_COUNT": "1"}.items():
        monkeypatch.setenv(f"TORCHELASTIC_{name}", value)
    words = command(tmp_path / "run", "--trainer.num_nodes=2", "--trainer.strategy=ddp")
    assert main(words) == 1
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun" in capsys.readouterr().err


@pytest.mark.processes
def test_a_killed_rank_and_a_restart_with_more(finished, command, tmp_path):
    run = tmp_path / "run"
    words = command(run, "--trainer.devices=2", "--trainer.strategy=ddp")
    process = subprocess.Popen(
        [sys.executable, "-m", "tasks", *words], env=slowly(), start_new_session=True
    )
    wait_for(run, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(FOREVER)
    words = command(run, "--trainer.devices=3", "--trainer.strategy=ddp")
    subprocess.run(
        [sys.executable, "-m", "tasks", *words], check=True, timeout=FOREVER, env=one_thread()
    )
    assert same_results(finished, run)


@pytest.mark.processes
def test_jobs_that_know_nothing_of_each_other(finished, predict, tmp_path):
    run = tmp_path / "run"
    predict(run, "--data.part=1", "--data.parts=2")
    assert sorted(p.name for p in run.glob("*.tar")) == ["000001.tar", "000003.tar"]
    (run / ".000002.tar.1.partial").write_bytes(b"being written by the other job")
    predict(run, "--data.part=1", "--data.parts=2")
    assert (run / ".000002.tar.1.partial").exists()
    predict(run, "--data.part=0", "--data.parts=2")
    assert same_results(finished, run)


def devices(ranks: int) -> list[str]:
    return [f"--trainer.devices={ranks}", "--trainer.strategy=ddp"] if ranks > 1 else []


def start(words: list[str], env: dict[str, str] | None = None) -> subprocess.Popen[str]:
    """A command as the first process of a group of its own, as a shell starts it."""
    return subprocess.Popen(
        [sys.executable, "-m", "tasks", *words],
        env=env or slowly(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=_heed_signals,
    )


def _heed_signals() -> None:
    """In a script's background, or under nohup, these are ignored, and so they would be by this one."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def alive(group: int) -> set[int]:
    """The living processes of a group."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has just ended
            state, _, its = path.read_text().rsplit(")", 1)[1].split()[:3]
            if int(its) == group and state != "Z":
                found.add(int(path.parent.name))
    return found


def local_rank(pid: int) -> int:
    """Which rank a process is, or works for; 0 for the first one's."""
    variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return next((int(v[11:]) for v in variables if v.startswith(b"LOCAL_RANK=")), 0)


def heeds(process: subprocess.Popen[str], number: int) -> bool:
    """Whether a process has a handler of its own for a signal; Python's is there from the start."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    caught = int(status.split("SigCgt:")[1].split()[0], 16)
    return bool(caught >> (signal.SIGUSR1 - 1) & 1) and bool(caught >> (number - 1) & 1)


def slowly() -> dict[str, str]:
    """An environment in which every batch takes at least half a second."""
    return {**one_thread(), "PYTHONPATH": str(Path(__file__).parent / "slow")}


def wait_for(run: Path, process: subprocess.Popen[Any]) -> None:
    """Until the first output shard is there."""
    while not list(run.glob("*.tar")):
        assert process.poll() is None
        time.sleep(0.05)
