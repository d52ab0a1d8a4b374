"""A server with a line of its own: so much latency, so many bytes a second for all requests together.

    python benchmarks/_slow_server.py FOLDER LATENCY BYTES_A_SECOND

Serves the files of a folder on this machine and prints its port.
"""

from __future__ import annotations

import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

_CHUNK = 1 << 16
_BURST = 0.5  # seconds of sending that are made up for, where this process was not woken in time


class Line:
    """Sends what it is given one after the other, at its own speed."""

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self._free_at = 0.0
        self._lock = threading.Lock()

    def begin(self) -> None:
        """What was not sent before an answer begins is not made up for."""
        with self._lock:
            self._free_at = max(self._free_at, time.monotonic())

    def wait_for(self, count: int) -> None:
        """Wait until so many bytes more have had their turn."""
        with self._lock:
            self._free_at = max(self._free_at, time.monotonic() - _BURST) + count / self.rate
            until = self._free_at
        time.sleep(max(0.0, until - time.monotonic()))


def serve(folder: Path, latency: float, rate: float) -> None:
    """Answer requests until this process is ended."""
    line = Line(rate)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            content = (folder / Path(self.path).name).read_bytes()
            time.sleep(latency)
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            line.begin()
            for start in range(0, len(content), _CHUNK):
                chunk = content[start : start + _CHUNK]
                line.wait_for(len(chunk))
                self.wfile.write(chunk)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(server.server_port, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    serve(Path(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3]))
