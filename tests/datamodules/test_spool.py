"""Remote shards are fetched ahead of their readers, within bounds, and leave nothing behind."""

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from common.errors import UserError
from datamodules import Images, _fetch, _spool
from datamodules._spool import SpoolFolder
from tests.datamodules.shard_server import read, status, whole


def until(condition: Callable[[], bool], seconds: float = 60) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        threading.Event().wait(0.01)
    return condition()


def urls_of(server, count: int) -> list[str]:
    for number in range(count):
        server.files[f"{number}.tar"] = server.files["a.tar"]
    return [f"{server.url}/{number}.tar" for number in range(count)]


def test_several_workers_share_one_copy(server):
    server.faults["a.tar"] = [status(503)]
    keys, errors = read([f"{server.url}/a.tar", f"{server.url}/b.tar"], num_workers=2)
    assert (keys, errors) == (["a", "a"], [])
    assert sorted(server.asked) == ["a.tar", "a.tar", "b.tar"]


@pytest.mark.parametrize(
    ("bound", "held"), [({"ahead": 2}, 3), ({"ahead": 0}, 1), ({"ahead": 5, "ahead_bytes": 1}, 1)]
)
def test_shards_are_fetched_ahead_and_no_further_than_allowed(server, bound, held):
    data = Images(urls_of(server, 6), image_size=8, num_workers=0, **bound)
    for number, _ in enumerate(data.loader(), 1):
        wanted = min(number - 1 + held, 6)  # all are read in order, so those before are dropped
        assert until(lambda wanted=wanted: len(server.asked) == wanted)
        threading.Event().wait(0.1)
        assert len(server.asked) == wanted
    data.teardown("predict")
    assert not os.listdir(tempfile.tempdir)
    with pytest.raises(UserError, match=r"--data\.ahead"):
        Images("a.tar", ahead=-1)


def test_several_connections_share_what_the_readers_wait_for(server):
    together = []

    def late(request, content):  # all before it have been read by then
        together.append(until(lambda: "4.tar" in server.asked, seconds=10))
        whole(request, content)

    urls = urls_of(server, 6)
    server.faults["3.tar"] = [late]
    assert read(urls, ahead=1, connections=2) == (["a"] * 6, [])
    assert sorted(server.asked) == [f"{number}.tar" for number in range(6)]
    assert together == [True]


def test_a_full_disk_waits_for_what_is_still_being_read(server, monkeypatch):
    fetch = _spool.fetch

    def crowded(url, path, *more):
        if len([name for name in os.listdir(path.parent) if name.endswith(".tar")]) > 0:
            raise _fetch.NoRoom("no room")
        fetch(url, path, *more)

    monkeypatch.setattr(_spool, "fetch", crowded)
    assert read(urls_of(server, 3)) == (["a"] * 3, [])

    def full(*_):
        raise _fetch.NoRoom("no room")

    monkeypatch.setattr(_spool, "fetch", full)
    assert read(urls_of(server, 2)) == ([], ["no room"] * 2)


def test_a_fault_of_ours_in_fetching_is_no_lost_shard(server, monkeypatch):
    def faulty(*_):
        raise KeyError("ours")

    monkeypatch.setattr(_spool, "fetch", faulty)
    with pytest.raises(RuntimeError, match="KeyError: 'ours'"):
        read(f"{server.url}/a.tar")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_that_ends_early_leaves_no_fetch_behind(server, workers):
    server.faults["1.tar"] = [server.stall]
    data = Images(urls_of(server, 3), image_size=8, num_workers=workers)
    batches = iter(data.loader())
    assert next(batches).keys == ["a"]
    assert until(lambda: "1.tar" in server.asked)
    data.on_exception(KeyboardInterrupt())
    assert not [name for name in os.listdir(tempfile.tempdir) if "shards" in name]
    assert not [thread for thread in threading.enumerate() if thread.name == "fetch"]


def test_what_a_killed_process_left_is_cleared_and_nothing_else(own_temporary_folder):
    code = (
        "import sys, tempfile, time; tempfile.tempdir = sys.argv[1]\n"
        "from datamodules._spool import SpoolFolder\n"
        "folder = SpoolFolder(); print(folder.path, flush=True); time.sleep(600)"
    )
    command = [sys.executable, "-c", code, tempfile.gettempdir()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        theirs = Path(process.stdout.readline().strip())
        (theirs / "half a shard").write_bytes(b"x")
        mine = SpoolFolder()
        assert theirs.exists()
        process.send_signal(signal.SIGKILL)
        process.wait()
        again = SpoolFolder()
    assert not theirs.exists()
    assert mine.path.exists()
    mine.cleanup()
    again.cleanup()
    assert not os.listdir(tempfile.gettempdir())
