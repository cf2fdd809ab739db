"""A proxy on the loopback interface, for plain HTTP and for tunnels; `seen` is every request line."""

from __future__ import annotations

import http.client
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit


class Handler(BaseHTTPRequestHandler):
    """Sends a request on to the host that it names, or bytes both ways."""

    protocol_version = "HTTP/1.1"
    seen: list[str]

    def log_message(self, *_args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.seen.append(f"{self.command} {self.path}")
        target = urlsplit(self.path)
        if target.hostname is None:  # as a proxy would: it is no server itself
            self.send_error(400)
            return
        onward = http.client.HTTPConnection(target.hostname, target.port)
        onward.request(self.command, f"{target.path}?{target.query}", headers=dict(self.headers))
        answer = onward.getresponse()
        body = answer.read()
        self.send_response_only(answer.status)
        for name, value in answer.getheaders():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
        onward.close()

    do_GET = do_HEAD

    def do_CONNECT(self) -> None:
        self.seen.append(f"{self.command} {self.path}")
        host, port = self.path.split(":")
        with socket.create_connection((host, int(port))) as onward:
            self.send_response(200)
            self.end_headers()
            back = threading.Thread(target=_copy, args=(onward, self.connection))
            back.start()
            _copy(self.connection, onward)
            back.join()
        self.close_connection = True


def _copy(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(2**16):
            target.sendall(data)
    with suppress(OSError):
        target.shutdown(socket.SHUT_WR)


@contextmanager
def proxying() -> Iterator[tuple[str, list[str]]]:
    """Lend a proxy's address and what it was asked for."""
    seen: list[str] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"seen": seen}))
    server.daemon_threads, server.block_on_close = True, False
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", seen
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
