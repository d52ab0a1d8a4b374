"""The processes of a run: they do the same together as one alone, and end together."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from datamodules import Shapes
from tasks import Explainability
from tasks.__main__ import main
from tasks._task import BackboneConfig
from tasks.run import processes
from tests.tasks.conftest import FOREVER, same_results, with_broken_sample
from tests.tasks.processes import alive, devices, local_rank, slowly, start, wait_for


@pytest.mark.processes
def test_several_processes_give_the_same_files(finished, command, tmp_path):
    words = command(tmp_path / "run", *devices(2))
    done = subprocess.run(
        [sys.executable, "-m", "tasks", *words, "--trainer.enable_progress_bar=true"],
        check=True,
        timeout=FOREVER,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert same_results(finished, tmp_path / "run")
    # The first process never knows how many images will be its own.
    assert re.search(r"process 0 of 2: \d+ images, .* [234] of 4 shards begun", done.stderr)
    (job,) = map(json.loads, (tmp_path / "run" / "jobs.jsonl").read_text().splitlines())
    assert (job["images"], job["processes"]) == (20, 2)


def test_shards_are_handed_out_without_a_writer_too(tiny, scenes, monkeypatch):
    """As in a `trainer.predict` of one's own; two processes, here one after the other."""
    store = torch.distributed.HashStore()
    monkeypatch.setattr(torch.distributed.distributed_c10d, "_get_default_store", lambda: store)

    def broadcast(found, src):
        return "the first one's name" if isinstance(found, str) else found

    strategy = SimpleNamespace(root_device=torch.device("cpu"), broadcast=broadcast)
    read = []
    for rank in (1, 0):
        data = Shapes(str(scenes), num_workers=0)
        trainer = SimpleNamespace(
            global_rank=rank, world_size=2, num_devices=2, strategy=strategy, datamodule=data
        )
        trainer.is_global_zero = True  # has the texts
        task = Explainability(BackboneConfig(str(tiny), None))
        data.trainer = task.trainer = trainer
        task.setup("predict")
        read.append([batch.shard for batch in data.loader() if batch.last])
        data.teardown("predict")
    assert read == [["000001", "000002", "000003"], ["000000"]]


LATE = """
import time
from pathlib import Path
from lightning.pytorch import Callback
from common import signals

class Late(Callback):
    'Keeps the last two shards until the first two are done, and the run has had time to stop.'

    def __init__(self, run: str) -> None:
        self.first = [Path(run) / f'00000{number}.tar' for number in (0, 1)]

    def on_predict_batch_start(self, trainer, module, batch, *_):
        while batch.shard > '000001' and not all(path.exists() for path in self.first):
            time.sleep(0.05)
            signals.check()
        until = time.monotonic() + 30
        while batch.shard > '000001' and time.monotonic() < until:
            time.sleep(0.05)
            signals.check()
"""


@pytest.mark.processes
def test_bad_samples_of_all_processes_are_counted_together(scenes, command, tmp_path):
    folder = with_broken_sample(scenes, tmp_path / "shards", "000001")
    run = tmp_path / "run"
    (tmp_path / "late.py").write_text(LATE)
    late = json.dumps([{"class_path": "late.Late", "init_args": {"run": str(run)}}])
    words = command(run, f"--data.shards={folder}", "--data.max_error_rate=0.001")
    words += [*devices(2), f"--trainer.callbacks={late}"]
    done = subprocess.run(
        [sys.executable, "-m", "tasks", *words],
        timeout=FOREVER,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert done.returncode == 1
    assert "2 of 12 samples are bad, more than --data.max_error_rate 0.001 allows" in done.stderr
    assert "Traceback" not in done.stderr
    assert not {"000002.tar", "000003.tar"} & {path.name for path in run.iterdir()}
    assert (run / "errors.jsonl").read_text()  # whichever process counted the second one


@pytest.mark.processes
def test_torchrun_with_more_ranks_than_shards(predict, command, scenes, tmp_path):
    shards = f"--data.shards={scenes}/00000[12].tar"
    one = predict(tmp_path / "one", shards)
    words = command(tmp_path / "run", shards, *devices(3))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3", "-m", "tasks"]
    subprocess.run([sys.executable, *launcher, *words], check=True, timeout=FOREVER)
    assert same_results(one, tmp_path / "run")


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
def test_a_killed_rank_and_a_restart_with_more(finished, command, tmp_path):
    run = tmp_path / "run"
    words = command(run, *devices(2))
    process = subprocess.Popen(
        [sys.executable, "-m", "tasks", *words], env=slowly(), start_new_session=True
    )
    wait_for(run, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(FOREVER)
    words = command(run, *devices(3))
    subprocess.run([sys.executable, "-m", "tasks", *words], check=True, timeout=FOREVER)
    assert same_results(finished, run)


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


def test_a_checkpoint_that_a_training_left_under_slurm(finished, predict, monkeypatch, tmp_path):
    task = {"NTASKS": 1, "JOB_NAME": "job", "JOB_ID": 7, "PROCID": 0, "LOCALID": 0, "NODEID": 0}
    for name, value in task.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    monkeypatch.chdir(tmp_path)
    Path("hpc_ckpt_1.ckpt").write_bytes(b"weights of something else")
    assert same_results(finished, predict(tmp_path / "run"))


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
