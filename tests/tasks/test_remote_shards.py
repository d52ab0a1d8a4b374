"""Runs over shards that a server sends, or that are packed."""

import functools
import gzip
import http.server
import json
import threading
import time
from typing import ClassVar

from datamodules import _fetch
from tests.tasks.conftest import FOREVER


class Flaky(http.server.SimpleHTTPRequestHandler):
    """Serves a folder, but the first request for the second shard breaks off; the last is gone."""

    broken: ClassVar[list[str]] = []

    def do_GET(self):
        if "000003" in self.path:
            self.send_error(404)
        elif "000001" in self.path and not self.broken:
            self.broken.append(self.path)
            self.send_response(200)
            self.send_header("Content-Length", "100000")
            self.end_headers()
            self.wfile.write(b"half a shard")
        else:
            super().do_GET()

    def log_message(self, *args):
        pass


def test_remote_shards_are_tried_again_and_then_listed(scenes, predict, monkeypatch, tmp_path):
    monkeypatch.setattr(_fetch, "_pause", lambda stop, seconds: None)
    handler = functools.partial(Flaky, directory=str(scenes))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/{{000000..000003}}.tar"
    run = predict(tmp_path / "run", f"--data.shards={url}", "--data.max_error_rate=0.5")
    server.shutdown()
    assert sorted(p.name for p in run.glob("*.tar")) == ["000000.tar", "000001.tar", "000002.tar"]
    (error,) = map(json.loads, (run / "errors.jsonl").read_text().splitlines())
    assert error["shard"] == "000003"
    assert "could not be fetched" in error["reason"]


def test_a_finished_shard_does_not_wait_for_the_next_one(scenes, predict, tmp_path):
    """The second shard is only sent once the first one's results are there."""
    run = tmp_path / "run"
    seen = []

    class Patient(http.server.SimpleHTTPRequestHandler):
        def do_GET(self):
            if "000001" in self.path:
                deadline = time.monotonic() + FOREVER
                while not (run / "000000.tar").exists() and time.monotonic() < deadline:
                    time.sleep(0.05)
                seen.append((run / "000000.tar").exists())
            super().do_GET()

        def log_message(self, *args):
            pass

    handler = functools.partial(Patient, directory=str(scenes))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/{{000000..000001}}.tar?signature=SECRET"
    predict(run, f"--data.shards={url}", "--data.num_workers=1")
    server.shutdown()
    assert seen == [True]
    stored = [path for path in run.rglob("*") if path.is_file()]
    assert not [path for path in stored if b"SECRET" in path.read_bytes()]


def test_a_packed_shard(scenes, predict, tmp_path):
    packed = tmp_path / "000000.tar.gz"
    packed.write_bytes(gzip.compress((scenes / "000000.tar").read_bytes()))
    run = predict(tmp_path / "run", f"--data.shards={packed}")
    assert json.loads((run / "metrics.json").read_text())["images"] == 6
