"""A Hub on the loopback interface, for the real huggingface_hub client: right, or wrong in one named way."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

REPO = "someone/model"
SHA, NEXT_SHA = "1" * 40, "2" * 40


@dataclass
class FakeHub:
    """What the server serves, how it is wrong, and what it was asked: (method, path, authorization)."""

    folder: Path
    fault: str = ""
    where: str = ""
    listed: tuple[str, ...] = ()
    asked: list[tuple[str, str, str]] = field(default_factory=list)
    address: str = ""
    elsewhere: str = ""

    def files(self) -> list[str]:
        """Return the names in the repo's listing."""
        return [*sorted(path.name for path in self.folder.iterdir()), *self.listed]

    def answer(self, handler: Handler) -> None:
        """Answer a request, with the fault where it applies."""
        path = unquote(urlsplit(handler.path).path)
        self.asked.append((handler.command, path, handler.headers.get("Authorization", "")))
        if self.fault.isdigit() and self.where in path:
            handler.reply(int(self.fault), b'{"error":"no"}', {"X-Error-Message": "no"})
        elif self.fault == "timeout" and self.where in path:
            time.sleep(4)
        elif path.startswith(f"/api/models/{REPO}") and self.fault != "gone":
            self._api(handler, path)
        elif path.startswith(f"/{REPO}/resolve/"):
            self._file(handler, path)
        else:
            missing = {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}
            handler.reply(404, b'{"error":"Repository not found"}', missing)

    def _api(self, handler: Handler, path: str) -> None:
        if "/tree/" in path:
            entries = [self._entry(name) for name in self.files()]
            handler.reply(200, json.dumps(entries).encode())
            return
        sha = NEXT_SHA if self.fault == "moved" and len(self.asked) > 1 else SHA
        siblings = [{"rfilename": name} for name in self.files()]
        handler.reply(200, json.dumps({"id": REPO, "modelId": REPO, "sha": sha, "siblings": siblings}).encode())

    def _entry(self, name: str) -> dict[str, object]:
        data = self._data(name)
        return {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}

    def _data(self, name: str) -> bytes:
        path = self.folder / name
        return path.read_bytes() if path.is_file() else b"hostile"

    def _file(self, handler: Handler, path: str) -> None:
        name = path.split("/", 5)[5]
        data = self._data(name)
        wrong = self.where in name
        if self.fault == "redirect" and wrong:
            handler.reply(302, b"", {"Location": f"{self.elsewhere}/stolen/{name}", "X-Repo-Commit": SHA})
            return
        etag = (
            "f" * 40 if self.fault == "etag" and wrong and handler.command == "GET" else hashlib.sha1(data).hexdigest()
        )
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": SHA, "Accept-Ranges": "bytes"}
        if handler.command == "GET" and wrong and self.fault in ("reset", "short"):
            handler.reply(200, data[: len(data) // 2], {**headers, "Content-Length": str(len(data))})
            handler.close_connection = True
            if self.fault == "reset":
                handler.reset()
            return
        if self.fault == "long" and wrong and handler.command == "GET":
            data += b"more"
        handler.reply(200, data, headers)


class Handler(BaseHTTPRequestHandler):
    """The HTTP of the fake Hub."""

    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def do_GET(self) -> None:
        self.hub.answer(self)

    def do_HEAD(self) -> None:
        self.hub.answer(self)

    def reply(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        """Send a whole answer; HEAD gets none of the body."""
        self.send_response(status)
        for name, value in {
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
            **(headers or {}),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
            self.wfile.flush()

    def reset(self) -> None:
        """Break the connection."""
        import socket
        import struct

        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    def log_message(self, *_args: object) -> None:
        pass


@contextmanager
def serve(hub: FakeHub) -> Iterator[FakeHub]:
    """Serve a fake Hub for as long as the block lasts."""
    handler = type("BoundHandler", (Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.handle_error = lambda *_args: None  # type: ignore[method-assign]
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
