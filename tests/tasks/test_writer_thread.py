"""Shards written beside the model: in order, whole or not at all, whatever fails or is stopped."""

import time

import pytest
import torch

from datamodules.shapes import INFO
from tasks.run import Facts, ImageResult
from tasks.run.shard import OutputShard, load_states
from tasks.run.writer_thread import WriterThread
from tests.tasks.conftest import members


def images(first: int, count: int, draw=None) -> list[ImageResult]:
    return [ImageResult(f"{i:03d}", (Facts({"n": i}),), draw) for i in range(first, first + count)]


def states() -> dict[str, torch.Tensor]:
    time.sleep(0.05)  # as from a GPU
    return {"a.b": torch.tensor([3])}


def test_whole_shards_are_published_in_order_while_the_next_are_computed(tmp_path):
    def slower_the_earlier():
        assert torch.is_inference_mode_enabled()
        time.sleep(0.002 * next(waits))
        return {}

    files = {}
    for encoders in (1, 4):
        waits = iter(range(40, 0, -1))
        folder = tmp_path / str(encoders)
        folder.mkdir()
        thread = WriterThread(encoders)
        for name in "ab":
            shard = OutputShard(folder, name, "tar", INFO)
            for start in (0, 8):
                thread.add(shard, images(start, 8, slower_the_earlier))
            thread.publish(shard, states)
        thread.finish()
        files[encoders] = [(folder / f"{name}.tar").read_bytes() for name in "ab"]
        keys = [name[:3] for name in members(folder / "a.tar") if name.endswith(".json")][:16]
        assert keys == [f"{i:03d}" for i in range(16)]
        assert load_states(folder / "a.tar")[1]["a.b"].tolist() == [3]
        thread.drop()
    assert files[1] == files[4]


def test_a_stop_publishes_what_is_whole_and_forgets_the_rest(tmp_path):
    thread = WriterThread(waiting=9)
    whole, unfinished = (OutputShard(tmp_path, name, "tar", INFO) for name in "ab")
    thread.add(whole, images(0, 2))
    thread.publish(whole, states)
    for start in range(4):
        thread.add(unfinished, images(start, 1))
    thread.drop()
    assert not unfinished.keys
    unfinished.abandon()
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar"]


def test_after_a_failure_nothing_is_published(tmp_path):
    def fail():
        raise OSError("no room")

    thread = WriterThread(2)
    first, second = (OutputShard(tmp_path, name, "files", INFO) for name in "ab")
    thread.add(first, images(0, 3, fail))
    thread.publish(first, states)
    thread.add(second, images(0, 1))
    with pytest.raises(OSError, match="no room"):
        thread.finish()
    thread.drop()
    second.abandon()
    assert not list(tmp_path.iterdir())
