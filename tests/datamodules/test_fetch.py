"""One shard fetched from a server: what may pass is tried again, what does not is named."""

import gzip
import re

import pytest

from common.errors import UserError
from datamodules import Images, _fetch
from tests.datamodules.shard_server import (
    cut,
    cut_in_chunks,
    cut_of_unknown_length,
    read,
    reset,
    status,
    whole,
)

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
