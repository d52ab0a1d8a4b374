"""Signals: commands end in order, say so, and leave nothing behind."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from tasks.__main__ import main
from tests.tasks.conftest import FOREVER, same_results
from tests.tasks.processes import alive, devices, heeds, slowly, start, wait_for


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
def test_sigterm_while_a_rank_waits_for_another(finished, command, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    for name in ("000000.tar", "000003.tar", "metrics.json"):
        (run / name).unlink()
    words = command(run, *devices(2))
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
