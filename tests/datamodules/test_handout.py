"""Shards handed out to the processes of a run as these become free: each to one, whoever is slow."""

import os
import tarfile
import tempfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
import torch

from common.errors import UserError
from datamodules import Images
from datamodules._handout import Handout
from datamodules._samples import Wanted
from tests.datamodules.fakes import picture

COUNT = 8


class Counter:
    """What the processes' store does."""

    def __init__(self):
        self.value = 0
        self.lock = threading.Lock()

    def __call__(self, amount):
        with self.lock:
            self.value += amount
            return self.value


@pytest.fixture(autouse=True)
def _own_temporary_folder(tmp_path, monkeypatch):
    with tempfile.TemporaryDirectory() as folder:  # a short path: sockets of workers are in it
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield
        monkeypatch.undo()


@pytest.fixture
def shards(tmp_path):
    picture(tmp_path / "a.jpg", (20, 20))
    for number in range(COUNT):
        with tarfile.open(tmp_path / f"{number}.tar", "w") as tar:
            tar.add(tmp_path / "a.jpg", f"{number}.jpg")
    return [str(tmp_path / f"{number}.tar") for number in range(COUNT)]


@pytest.fixture
def urls(shards, tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(SimpleHTTPRequestHandler, "log_message", lambda *_: None)
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield [f"http://127.0.0.1:{server.server_port}/{number}.tar" for number in range(COUNT)]
    server.shutdown()
    server.server_close()


def batches_of(rank, ranks, shards, counter, workers):
    """The loader of one rank, which has begun."""
    data = Images(shards, image_size=8, num_workers=workers)
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    data.trainer = SimpleNamespace(
        global_rank=rank, world_size=ranks, num_devices=ranks, strategy=strategy
    )
    data.wanted = Wanted(counter=counter)
    try:
        for batch in data.loader():
            assert not batch.errors
            yield batch.shard
    finally:
        data.teardown("predict")


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("place", ["shards", "urls"])
def test_a_slow_process_leaves_the_shards_to_others(place, workers, request):
    counter = Counter()
    read = partial(batches_of, ranks=2, counter=counter, workers=workers)
    slow, quick = (read(rank, shards=request.getfixturevalue(place)) for rank in (0, 1))
    first = next(slow)
    others = list(quick)
    rest = list(slow)
    assert first == "0"
    assert others[0] == "1"
    assert sorted([first, *others, *rest], key=int) == [str(number) for number in range(COUNT)]
    assert others == sorted(others, key=int)
    # A part of what is left is taken ahead, by a loader worker or to be fetched: two of six at most.
    assert len(rest) <= (0 if (place, workers) == ("shards", 0) else 2)
    assert not os.listdir(tempfile.tempdir)
    assert not [thread for thread in threading.enumerate() if thread.name == "fetch"]


def test_more_processes_than_shards(shards):
    counter = Counter()
    found = [list(batches_of(rank, 3, shards[:2], counter, 0)) for rank in (2, 1, 0)]
    assert found == [[], ["1"], ["0"]]


def test_when_the_others_are_gone_a_process_ends_with_a_message(shards):
    def broken(amount):
        raise UserError("another process broke off")

    for workers in (0, 1):
        batches = batches_of(0, 2, shards, broken, workers)
        assert next(batches) == "0"
        with pytest.raises(UserError, match="another process broke off"):
            list(batches)


def test_nobody_takes_ahead_more_than_a_part_of_what_is_left():
    counter = Counter()
    mine = Handout(12, 0, 4, counter)
    assert mine.take() == 0
    assert mine.allows(1)
    assert not mine.allows(2)  # of the eight that are left, four may wait, for four
    assert [mine.take(), mine.take()] == [4, 5]
    counter(6)
    assert not mine.allows(1)
    assert mine.take() is None
