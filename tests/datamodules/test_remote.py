"""Shards by every kind of URL, and what of these is secret."""

import sys
from importlib import import_module

import fsspec
import pytest

from common.errors import UserError
from datamodules import GCC3M
from datamodules._remote import without_query
from tests.datamodules.shard_server import read


def test_queries_are_taken_out_of_any_text():
    for text, clean in {
        "https://h/a.tar?X-Sig=1/2+3%20": "https://h/a.tar",
        "s3://b/a.tar#x": "s3://b/a.tar",
        "https://me:pass@h/a.tar": "https://h/a.tar",
        "pipe:curl -s 'https://h/a.tar?s=1' | cat": "pipe:curl -s 'https://h/a.tar' | cat",
        "shards: 'http://h/{0..3}.tar?s=1'\nname: what?": "shards: 'http://h/{0..3}.tar'\nname: what?",
    }.items():
        assert without_query(text) == clean


def test_other_stores_are_opened_by_fsspec(server):
    store = fsspec.filesystem("memory")
    store.pipe("/bucket/a.tar", server.files["a.tar"])
    assert read("memory://bucket/a.tar") == (["a"], [])
    _, (reason,) = read("memory://bucket/c.tar")
    assert "memory://bucket/c.tar could not be fetched: FileNotFoundError" in reason


def test_s3(server, monkeypatch):
    pytest.importorskip("s3fs")
    for name, value in {
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "SECRET",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    server.RequestHandlerClass.do_HEAD = server.RequestHandlerClass.do_GET
    server.files["bucket/a.tar"] = server.files["a.tar"]
    monkeypatch.setitem(fsspec.config.conf, "s3", {"endpoint_url": server.url})
    assert read("s3://bucket/a.tar") == (["a"], [])
    _, (reason,) = read("s3://bucket/c.tar")
    assert "s3://bucket/c.tar could not be fetched: FileNotFoundError" in reason


def test_a_protocol_that_nothing_opens_is_refused_at_once(monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    known = import_module("fsspec.registry")._registry
    monkeypatch.delitem(known, "s3", raising=False)
    with pytest.raises(UserError, match=r"pip install 'clip-surgery-lightning\[s3\]'"):
        read("s3://bucket/a.tar")
    with pytest.raises(UserError, match="nothing here opens nonsense://"):
        read("nonsense://bucket/a.tar?s=SECRET")
    with pytest.raises(UserError, match=r"names no tar: .* as memory://bucket/voc/\{000000"):
        GCC3M("memory://bucket/voc/").shard_list()
    with pytest.raises(UserError, match="only tars are read"):
        read("https://127.0.0.1/a.jpg")


def test_a_local_file_url_is_a_file(server, tmp_path):
    (tmp_path / "x.tar").write_bytes(server.files["a.tar"])
    assert read(f"file://{tmp_path}/x.tar") == (["a"], [])


def test_a_command_is_only_run_where_it_is_allowed(server, tmp_path):
    (tmp_path / "x.tar").write_bytes(server.files["a.tar"])
    shards = [f"pipe:cat {tmp_path}/x.tar", "pipe:echo some; exit 3"]
    fields = {"num_workers": 0, "image_size": 8}
    with pytest.raises(UserError, match=r"--data\.allow_pipe true"):
        GCC3M(shards, **fields).shard_list()
    good, bad = list(GCC3M(shards, allow_pipe=True, **fields).loader())
    assert good.keys == ["a"]
    assert "in 4 tries: the command ended with 3" in bad.errors[0].reason
