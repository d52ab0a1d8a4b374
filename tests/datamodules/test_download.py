"""Downloads against a local server: resumed, checked, unpacked safely, not done twice."""

import hashlib
import io
import os
import re
import tarfile
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from datamodules import VOC, _download
from datamodules._download import Archive, DownloadError, download, fetch, unpack
from tasks.__main__ import main
from tests.datamodules.fakes import fake_voc

DATA = os.urandom(300_000)


class Server(BaseHTTPRequestHandler):
    """Serves ``files``; understands Range; breaks off after ``breaks`` bytes, once an entry."""

    files: ClassVar[dict[str, bytes]] = {}
    breaks: ClassVar[list[int]] = []
    ranges = True
    asked: ClassVar[list[str]] = []

    def do_GET(self):
        data = self.files.get(self.path.lstrip("/"))
        wanted = self.headers.get("Range")
        self.asked.append(wanted or "")
        if data is None:
            self.send_error(404)
            return
        start = int(re.findall(r"\d+", wanted)[0]) if wanted and self.ranges else 0
        if start and start >= len(data):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(data)}")
            self.end_headers()
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        end = start + self.breaks.pop(0) if self.breaks else len(data)
        self.wfile.write(data[start:end])

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(_download.time, "sleep", lambda seconds: None)
    Server.files, Server.breaks, Server.asked, Server.ranges = {"data.bin": DATA}, [], [], True
    running = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{running.server_port}"
    running.shutdown()
    running.server_close()


MD5 = "md5:" + hashlib.md5(DATA).hexdigest()


def test_goes_on_where_it_broke_off(server, tmp_path):
    Server.breaks = [100_000, 50_000]
    assert fetch(Archive(f"{server}/data.bin", MD5), tmp_path).read_bytes() == DATA
    assert Server.asked == ["", "bytes=100000-", "bytes=150000-"]


def test_goes_on_in_another_process(server, tmp_path):
    (tmp_path / "data.bin.partial").write_bytes(DATA[:1000])
    assert fetch(Archive(f"{server}/data.bin", MD5), tmp_path).read_bytes() == DATA
    (tmp_path / "data.bin").rename(tmp_path / "data.bin.partial")  # killed just before the rename
    assert fetch(Archive(f"{server}/data.bin", MD5), tmp_path).read_bytes() == DATA


def test_a_server_without_ranges_starts_again(server, tmp_path):
    Server.ranges, Server.breaks = False, [100_000]
    assert fetch(Archive(f"{server}/data.bin", MD5), tmp_path).read_bytes() == DATA


def test_gives_up_in_the_end(server, tmp_path):
    Server.breaks = [10] * 20
    with pytest.raises(DownloadError, match="run again to go on from 60 bytes"):
        fetch(Archive(f"{server}/data.bin"), tmp_path)
    with pytest.raises(DownloadError, match="404"):
        fetch(Archive(f"{server}/missing.bin"), tmp_path)


def test_a_wrong_checksum_is_not_kept(server, tmp_path):
    with pytest.raises(DownloadError, match="published is 00"):
        fetch(Archive(f"{server}/data.bin", "sha1:00"), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_only_what_the_split_needs_and_only_once(server, tmp_path):
    archives = [
        Archive(f"{server}/data.bin", into="sub"),
        Archive(f"{server}/missing.bin", splits=("train",)),
    ]
    download(archives, tmp_path, "val")
    assert (tmp_path / "sub" / "data.bin").read_bytes() == DATA
    asked = len(Server.asked)
    download(archives, tmp_path, "val")
    assert len(Server.asked) == asked


@pytest.mark.parametrize("name", ["../evil", "/evil", "a/../../evil", "..\\evil", "C:/evil"])
def test_a_zip_stays_in_its_folder(name, tmp_path):
    with zipfile.ZipFile(tmp_path / "bad.zip", "w") as packed:
        packed.writestr(name, "x")
    with pytest.raises(DownloadError, match="unsafe member"):
        unpack(tmp_path / "bad.zip", tmp_path / "out" / "in")
    assert not any(path.name.endswith("evil") for path in tmp_path.rglob("*"))


@pytest.mark.parametrize("kind", ["../evil", "link"])
def test_a_tar_stays_in_its_folder(kind, tmp_path):
    member = tarfile.TarInfo(kind)
    if kind == "link":
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
    with tarfile.open(tmp_path / "bad.tar", "w") as bundle:
        bundle.addfile(member, io.BytesIO(b""))
    with pytest.raises(DownloadError, match="can't be unpacked"):
        unpack(tmp_path / "bad.tar", tmp_path / "out" / "in")
    assert not (tmp_path / "out" / "evil").exists()


def test_a_broken_archive_says_what_to_do(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as packed:
        packed.writestr("a", os.urandom(5000))
    data = bytearray((tmp_path / "x.zip").read_bytes())
    data[1000] ^= 255
    (tmp_path / "x.zip").write_bytes(data)
    with pytest.raises(DownloadError, match="delete it and run again"):
        unpack(tmp_path / "x.zip", tmp_path / "out")


def test_the_command_fetches_unpacks_and_converts(server, tmp_path, monkeypatch, capsys):
    fake_voc(tmp_path / "origin")
    with tarfile.open(tmp_path / "voc.tar", "w") as bundle:
        bundle.add(tmp_path / "origin" / "VOCdevkit", "VOCdevkit")
    Server.files = {"voc.tar": (tmp_path / "voc.tar").read_bytes()}
    monkeypatch.setattr(VOC, "archives", (Archive(f"{server}/voc.tar"),))
    argv = ["shards", "voc", "--source", str(tmp_path / "new"), "--output", str(tmp_path / "out")]
    assert main([*argv, "--workers", "1", "--download"]) == 0
    assert "4 samples" in capsys.readouterr().out
    assert Path(tmp_path / "new" / "downloads" / "voc.tar").exists()
