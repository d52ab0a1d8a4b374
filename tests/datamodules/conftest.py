"""A server of shards, and a folder for what is fetched from it."""

import gzip
import tempfile
import threading

import pytest

from datamodules import _fetch
from tests.datamodules.shard_server import Server, tar_of


@pytest.fixture
def own_temporary_folder(tmp_path, monkeypatch):  # after tmp_path, whose base would be in it
    with tempfile.TemporaryDirectory() as folder:  # a short path: sockets of workers are in it
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield
        monkeypatch.undo()


@pytest.fixture
def server(tmp_path, own_temporary_folder, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(_fetch, "_pause", lambda stop, seconds: None)
    server = Server()
    content = tar_of(tmp_path / "a.jpg")
    server.files |= {"a.tar": content, "b.tar": content, "a.tar.gz": gzip.compress(content)}
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server
    server.released.set()
    server.shutdown()
    server.server_close()
