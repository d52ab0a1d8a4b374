"""A server of shards on this machine, with every fault that servers have, and what is read from it."""

import io
import os
import tarfile
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from datamodules import Images
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
