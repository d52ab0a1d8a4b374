"""Shards of other machines: a real server on this one, with every fault that servers have."""

import gzip
import io
import os
import re
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from pathlib import Path

import fsspec
import pytest

from common.errors import UserError
from datamodules import GCC3M, Images, _fetch, _spool
from datamodules._remote import without_query
from datamodules._spool import SpoolFolder
from tests.datamodules.fakes import picture

Answer = Callable[[BaseHTTPRequestHandler, bytes], None]


def whole(request, content: bytes) -> None:
    request.send_response(200)
    request.send_header("Content-Length", str(len(content)))
    request.end_headers()
    if request.command == "GET":
        request.wfile.write(content)


def cut(request, content: bytes) -> None:
    request.send_response(200)
    request.send_header("Content-Length", str(len(content)))
    request.end_headers()
    request.wfile.write(content[: len(content) // 2])
    request.close_connection = True


def cut_of_unknown_length(request, content: bytes) -> None:
    request.send_response(200)
    request.end_headers()
    request.wfile.write(content[: len(content) // 2])
    request.close_connection = True


def cut_in_chunks(request, content: bytes) -> None:
    request.protocol_version = "HTTP/1.1"
    request.send_response(200)
    request.send_header("Transfer-Encoding", "chunked")
    request.end_headers()
    request.wfile.write(b"%x\r\n%s\r\n" % (1000, content[:1000]))
    request.close_connection = True


def reset(request, content: bytes) -> None:
    request.connection.close()


def status(code: int) -> Answer:
    return lambda request, content: request.send_error(code)


class Server(ThreadingHTTPServer):
    """Answers the requests for each path with the faults listed for it, in turn, then as it should."""

    daemon_threads = True

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.faults: dict[str, list[Answer]] = {}
        self.asked: list[str] = []
        self.released = threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                name = self.path.split("?")[0].strip("/")
                server.asked.append(name)
                faults = server.faults.get(name, [])
                answer = faults.pop(0) if faults else whole
                if name in server.files:
                    answer(self, server.files[name])
                else:
                    self.send_error(404)

            def log_message(self, *args):
                pass

            def finish(self):
                with suppress(OSError):  # a connection that a fault closed
                    super().finish()

        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address):
        pass

    def stall(self, request, content: bytes) -> None:
        request.send_response(200)
        request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        request.wfile.write(content[:1000])
        request.wfile.flush()
        self.released.wait()


@pytest.fixture
def server(tmp_path, monkeypatch):
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


@pytest.fixture(autouse=True)
def _own_temporary_folder(tmp_path, monkeypatch):  # after tmp_path, whose base would be in it
    with tempfile.TemporaryDirectory() as folder:  # a short path: sockets of workers are in it
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield
        monkeypatch.undo()


def tar_of(image: Path) -> bytes:
    picture(image, (80, 120))
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        tar.add(image, "a.jpg")
    return file.getvalue()


def read(path, **fields):
    """Keys and reasons of all that is read."""
    data = Images(path, image_size=8, **{"num_workers": 0, **fields})
    batches = list(data.loader())
    data.teardown("predict")
    assert not os.listdir(tempfile.tempdir)
    return [k for b in batches for k in b.keys], [e.reason for b in batches for e in b.errors]


TRANSIENT = [
    cut,
    cut_of_unknown_length,
    cut_in_chunks,
    reset,
    status(500),
    status(503),
    status(429),
]


@pytest.mark.parametrize("fault", TRANSIENT)
@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz"])
def test_what_may_pass_is_tried_again(name, fault, server, caplog):
    server.faults[name] = [fault, fault]
    assert read(f"{server.url}/{name}?signature=SECRET") == (["a"], [])
    assert server.asked == [name] * 3
    assert "trying again in 1 s (1 of 3)" in caplog.text
    assert "SECRET" not in caplog.text


@pytest.mark.parametrize("fault", TRANSIENT)
def test_what_does_not_pass_is_given_up_and_named(fault, server):
    server.faults["a.tar"] = [fault] * 4
    keys, (reason,) = read([f"{server.url}/a.tar?signature=SECRET", f"{server.url}/b.tar"])
    assert keys == ["a"]
    assert reason.startswith(f"{server.url}/a.tar could not be fetched in 4 tries: ")
    assert not re.search(r"SECRET|0x|clip_surgery|partial", reason)


@pytest.mark.parametrize("code", [400, 401, 403, 404, 410])
def test_what_is_for_ever_is_not_tried_again(code, server):
    server.faults["a.tar"] = [status(code)]
    _, (reason,) = read(f"{server.url}/a.tar?signature=SECRET")
    assert reason.startswith(f"{server.url}/a.tar could not be fetched: HTTP {code}")
    assert server.asked == ["a.tar"]


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz"])
def test_a_server_that_stalls_is_given_up(name, server, caplog):
    server.faults[name] = [server.stall]
    assert read(f"{server.url}/{name}", timeout=1.5) == (["a"], [])
    assert re.search("nothing came for 1.5 s|timed out", caplog.text)
    with pytest.raises(UserError, match=r"--data\.timeout"):
        Images(f"{server.url}/a.tar", timeout=0)


def test_a_slow_server_gives_signs_of_life(server, monkeypatch, caplog):
    monkeypatch.setattr(_fetch, "_SIGN_OF_LIFE", 0.5)
    caplog.set_level("INFO")

    def slow(request, content):
        request.send_response(200)
        request.end_headers()
        for part in (content[:1000], content[1000:]):
            request.wfile.write(part)
            request.wfile.flush()
            server.released.wait(1.5)

    server.faults["a.tar"] = [slow]
    assert read(f"{server.url}/a.tar") == (["a"], [])
    assert "still fetching, 0 MB so far" in caplog.text


def test_a_tar_that_is_broken_at_its_source_is_fetched_once(server):
    server.files["a.tar"] = server.files["a.tar"][:1700]
    server.files["a.tar.gz"] = server.files["a.tar.gz"][:-30]
    assert "cut off inside 'a.jpg'" in read(f"{server.url}/a.tar")[1][0]
    assert "can't be unpacked" in read(f"{server.url}/a.tar.gz")[1][0]
    assert server.asked == ["a.tar", "a.tar.gz"]


def test_what_is_larger_than_the_limit_is_not_unpacked(server, tmp_path):
    bomb = gzip.compress(server.files["a.tar"] + bytes(30 << 20))
    server.files["a.tar.gz"] = bomb
    (tmp_path / "local.tar.gz").write_bytes(bomb)
    for path in (f"{server.url}/a.tar.gz", str(tmp_path / "local.tar.gz")):
        _, (reason,) = read(path, max_shard_bytes=1 << 20)
        assert "more than 1048576 bytes: raise --data.max_shard_bytes" in reason
    server.faults["b.tar"] = [cut]
    _, (reason,) = read(f"{server.url}/b.tar", max_shard_bytes=100)
    assert "more than 100 bytes" in reason


def test_a_password_in_a_url_is_used_and_not_shown(server):
    seen = []
    server.faults["a.tar"] = [
        lambda request, content: (
            seen.append(request.headers["Authorization"]),
            reset(request, b""),
        )
    ] * 4
    url = server.url.replace("://", "://me:SECRET@")
    _, (reason,) = read(f"{url}/a.tar")
    assert seen[0] == "Basic bWU6U0VDUkVU"
    assert "SECRET" not in reason


@pytest.mark.parametrize(("host", "told"), [("127.0.0.1", True), ("localhost", False)])
def test_a_password_is_told_to_no_other_server(host, told, server):
    seen = []

    def redirect(request, content):
        request.send_response(302)
        request.send_header("Location", f"http://{host}:{server.server_port}/b.tar")
        request.end_headers()

    def note(request, content):
        seen.append(request.headers["Authorization"] is not None)
        whole(request, content)

    server.faults |= {"a.tar": [redirect], "b.tar": [note]}
    assert read(f"{server.url}/a.tar".replace("://", "://me:SECRET@")) == (["a"], [])
    assert seen == [told]


def test_several_workers_share_one_copy(server):
    server.faults["a.tar"] = [status(503)]
    keys, errors = read([f"{server.url}/a.tar", f"{server.url}/b.tar"], num_workers=2)
    assert (keys, errors) == (["a", "a"], [])
    assert sorted(server.asked) == ["a.tar", "a.tar", "b.tar"]


def urls_of(server, count: int) -> list[str]:
    for number in range(count):
        server.files[f"{number}.tar"] = server.files["a.tar"]
    return [f"{server.url}/{number}.tar" for number in range(count)]


def until(condition: Callable[[], bool], seconds: float = 60) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        threading.Event().wait(0.01)
    return condition()


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


def test_what_a_killed_process_left_is_cleared_and_nothing_else(tmp_path):
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
