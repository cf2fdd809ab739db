"""A Hub on the loopback interface, for the real huggingface_hub client: models, large files on another host, uploads, faults.

The Hub answers at 127.0.0.1; large files, as on the real one, are redirected to a storage server with signed addresses, which
answers at `localhost`. A `Fault` makes one kind of answer wrong, a given number of times.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import ssl
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

REPO = "someone/model"
LARGE = (".safetensors", ".bin", ".model")
PIECE = 2**18


@dataclass
class Fault:
    """What is wrong with an answer: `kind`, for requests whose `METHOD path` matches `where`, the first `times` of them.

    Kinds: a status, as "503"; "reset" and "short" after half of the body, "long", "slow", "timeout", "whole" (200 in answer to a
    range), "range" (other bytes than asked for), "total" (another length), "etag", "encoded", "expired" (403 of an address),
    "chunked" (without a length), "last" (the connection ends after the answer), "hang" (it ends instead of an answer).
    """

    kind: str
    where: str = ""
    times: int = 10**9
    headers: dict[str, str] = field(default_factory=dict)
    met: int = 0


@dataclass
class Asked:
    """A request that was made, and how many bytes of body it was answered with."""

    host: str
    method: str
    path: str
    range: str
    authorization: str
    sent: int = 0


@dataclass
class Content:
    """A file's content, in memory or in a file, with its digests."""

    size: int
    sha1: str
    sha256: str
    data: bytes = b""
    path: Path | None = None

    @classmethod
    def of(cls, source: bytes | Path) -> Content:
        if isinstance(source, bytes):
            git = hashlib.sha1(b"blob %d\0" % len(source) + source).hexdigest()
            return cls(len(source), git, hashlib.sha256(source).hexdigest(), source)
        one, other = hashlib.sha1(b"blob %d\0" % source.stat().st_size), hashlib.sha256()
        with source.open("rb") as file:
            while piece := file.read(2**20):
                one.update(piece)
                other.update(piece)
        return cls(source.stat().st_size, one.hexdigest(), other.hexdigest(), path=source)

    def pieces(self, start: int, end: int) -> Iterator[bytes]:
        if self.path is None:
            yield self.data[start:end]
            return
        with self.path.open("rb", buffering=0) as file:
            file.seek(start)
            while start < end:
                piece = file.read(min(PIECE, end - start))
                start += len(piece)
                yield piece


@dataclass
class Repo:
    """A repo: its commits, newest last, as listings of files, and those of other branches than `main` by name."""

    commits: list[tuple[str, dict[str, Content]]] = field(default_factory=list)
    private: bool = False
    card: dict[str, object] = field(default_factory=dict)
    gated: bool = False
    messages: list[str] = field(default_factory=list)
    pulls: dict[str, tuple[str, dict[str, Content]]] = field(default_factory=dict)
    branches: dict[str, list[tuple[str, dict[str, Content]]]] = field(default_factory=dict)

    def oid(self, name: str, revision: str) -> str | None:
        """What the client compares a file with, to see whether it is there already."""
        found = self.at(revision)
        content = None if found is None else found[1].get(name)
        return None if content is None else content.sha256 if name.endswith(LARGE) else content.sha1

    def commit(self, files: dict[str, Content], message: str = "", branch: str = "main") -> str:
        commits = self.branches.get(branch, self.commits)
        sha = hashlib.sha1(
            repr((branch, len(commits), sorted((n, c.sha256) for n, c in files.items()))).encode()
        ).hexdigest()
        commits.append((sha, files))
        self.messages.append(message)
        return sha

    def at(self, revision: str) -> tuple[str, dict[str, Content]] | None:
        if revision in ("main", "HEAD"):
            return self.commits[-1]
        if revision in self.branches:
            return self.branches[revision][-1]
        every = [found for commits in (self.commits, *self.branches.values()) for found in commits]
        return self.pulls.get(revision) or next((found for found in every if found[0] == revision), None)


class LoopbackHub:
    """The state of the servers; `asked` is every request."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.stored: dict[str, Content] = {}
        self.faults: list[Fault] = []
        self.asked: list[Asked] = []
        self.address = self.storage = ""
        self.token = ""  # needed for private repos and for writing
        self.bytes_per_second = 0
        self.latency = 0.0
        self.connections = 0  # that were opened
        self._lock = threading.Lock()

    def add(self, folder: Path, repo_id: str = REPO) -> str:
        """Add a repo with the content of a folder; return its commit."""
        files = {
            str(path.relative_to(folder)): Content.of(path if path.stat().st_size > 2**16 else path.read_bytes())
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        repo = self.repos.setdefault(repo_id, Repo())
        return repo.commit(files)

    def fault(self, kind: str, where: str = "", times: int = 10**9, **headers: str) -> None:
        self.faults.append(
            Fault(kind, where, times, {name.replace("_", "-"): value for name, value in headers.items()})
        )

    def met(self, line: str) -> Fault | None:
        """Return the fault of a request, and count it."""
        with self._lock:
            for fault in self.faults:
                if re.search(fault.where, line) and fault.met < fault.times:
                    fault.met += 1
                    return fault
        return None

    @property
    def sent(self) -> int:
        """Bytes of bodies that were sent."""
        return sum(each.sent for each in self.asked)

    def reset_counts(self) -> None:
        self.asked.clear()


class Handler(BaseHTTPRequestHandler):
    """HTTP of the Hub and of its storage: which one it is, the port tells."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    hub: LoopbackHub
    is_storage = False

    def setup(self) -> None:
        super().setup()
        self.hub.connections += 1

    def log_message(self, *_args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    do_GET = do_POST = do_PUT = do_HEAD

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        own = Asked(
            "storage" if self.is_storage else "hub", self.command, path, self.headers.get("Range", ""),
            self.headers.get("Authorization", ""),
        )  # fmt: skip
        self._asked = own
        self.hub.asked.append(own)
        length = int(self.headers.get("Content-Length") or 0)
        self._body = self.rfile.read(length) if self.command in ("POST",) else b""
        if self.hub.latency:
            time.sleep(self.hub.latency)
        fault = self.hub.met(f"{own.host} {self.command} {path}")
        self._fault = fault.kind if fault is not None else ""
        if fault is not None and fault.kind.isdigit():
            if self.command == "PUT":
                self.rfile.read(length)
            self.reply(int(fault.kind), b'{"error":"no"}', {"X-Error-Message": "no", **fault.headers})
        elif self._fault == "timeout":
            time.sleep(4)
            self.close_connection = True
        elif self._fault == "hang":
            self.close_connection = True
        elif self.is_storage:
            self._storage(path, length)
        else:
            self._hub(path)

    def _hub(self, path: str) -> None:
        if path.startswith("/api/agent-harnesses"):
            self.reply(200, b"{}")
            return
        if path == "/api/repos/create":
            self._create()
            return
        if match := re.fullmatch(r"/api/(?:models/|(?=datasets/))((?:datasets/)?[^/]+/[^/]+)(/.*)?", path):
            self._api(match[1], match[2] or "")
        elif match := re.fullmatch(r"/((?:datasets/)?[^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._resolve(match[1], match[2], match[3])
        elif match := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            self._batch()
        elif path == "/api/validate-yaml":
            self.reply(200, b'{"errors":[],"warnings":[]}')
        else:
            self._missing("EntryNotFound")

    def _missing(self, code: str, status: int = 404) -> None:
        self.reply(status, json.dumps({"error": code}).encode(), {"X-Error-Code": code, "X-Error-Message": code})

    def _allowed(self, repo_id: str) -> Repo | None:
        """Return the repo, or answer why not."""
        repo = self.hub.repos.get(repo_id)
        known = self._asked.authorization == f"Bearer {self.hub.token}" and self.hub.token
        if self._asked.authorization and self.hub.token and not known:
            self.reply(401, b'{"error":"Invalid credentials"}', {"X-Error-Message": "Invalid credentials"})
        elif repo is None or (repo.private and not known):
            self._missing("RepoNotFound", 404 if known else 401)
        elif repo.gated and not known:
            self._missing("GatedRepo", 403)
        else:
            return repo
        return None

    def _api(self, repo_id: str, rest: str) -> None:
        repo = self._allowed(repo_id)
        if repo is None:
            return
        if rest.startswith("/preupload/"):
            asked, at = json.loads(self._body)["files"], rest.removeprefix("/preupload/")
            modes = [
                {"path": each["path"], "uploadMode": "lfs" if each["path"].endswith(LARGE) else "regular", "shouldIgnore": False, "oid": repo.oid(each["path"], at)}
                for each in asked
            ]  # fmt: skip
            self.reply(200, json.dumps({"files": modes}).encode())
            return
        if rest.startswith("/commit/"):
            self._commit(repo_id, repo, rest.removeprefix("/commit/"))
            return
        if rest.startswith("/commits/"):
            commits = [
                {"id": sha, "authors": [], "date": "2026-01-01T00:00:00Z", "title": "", "message": ""}
                for sha, _ in reversed(repo.commits)
            ]
            self.reply(200, json.dumps(commits).encode())
            return
        if rest.startswith("/branch/"):
            self._branch(repo, rest.removeprefix("/branch/"))
            return
        if rest.startswith("/tree/"):
            found = repo.at(rest.removeprefix("/tree/"))
            if found is None:
                self._missing("RevisionNotFound")
            else:
                self.reply(200, json.dumps([_entry(name, each) for name, each in found[1].items()]).encode())
            return
        revision = rest.removeprefix("/revision/") if rest.startswith("/revision/") else "main"
        found = repo.at(revision)
        if found is None:
            self._missing("RevisionNotFound")
            return
        siblings = [{"rfilename": name} for name in found[1]]
        about = {"id": repo_id, "modelId": repo_id, "sha": found[0], "siblings": siblings, "cardData": repo.card}
        self.reply(200, json.dumps(about).encode())

    def _resolve(self, repo_id: str, revision: str, name: str) -> None:
        repo = self._allowed(repo_id)
        if repo is None:
            return
        found = repo.at(revision)
        if found is None or name not in found[1]:
            self._missing("EntryNotFound" if found else "RevisionNotFound")
            return
        sha, content = found[0], found[1][name]
        large = name.endswith(LARGE)
        etag = "0" * 64 if self._fault == "etag" else content.sha256 if large else content.sha1
        headers = {"X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        if large:
            self.hub.stored[content.sha256] = content
            location = f"{self.hub.storage}/{content.sha256}/{name}?Signature=secret{int(time.time() * 1000)}"
            headers |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(content.size), "Location": location}
            self.reply(302, b"", headers)
        else:
            self._send(content, {**headers, "ETag": f'"{etag}"'})

    def _storage(self, path: str, length: int) -> None:
        if self.command == "PUT":
            self._upload(path, length)
            return
        if "Authorization" in self.headers or not parse_qs(urlsplit(self.path).query).get("Signature"):
            self.reply(400, b"a token has no business here")
            return
        if self._fault == "expired":
            self.reply(403, b"<Error>Request has expired</Error>")
            return
        content = self.hub.stored.get(path.split("/")[1])
        if content is None:
            self.reply(404, b"")
        else:
            self._send(content, {"ETag": f'"{"changed" if self._fault == "etag" else content.sha256}"'})

    def _send(self, content: Content, headers: dict[str, str]) -> None:
        """Send a content or a range of it, with the fault that is due."""
        start, end, status = 0, content.size, 200
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if match and self._fault != "whole":
            start, end, status = int(match[1]), min(int(match[2]) + 1, content.size), 206
            if start >= content.size:
                self.reply(416, b"", {"Content-Range": f"bytes */{content.size}"})
                return
            shown = start + 1 if self._fault == "range" else start
            total = content.size + 1 if self._fault == "total" else content.size
            headers["Content-Range"] = f"bytes {shown}-{end - 1}/{total}"
        if self._fault == "encoded":
            headers["Content-Encoding"] = "gzip"
        size = end - start
        promised = size // 2 if self._fault == "half" else size + 4 if self._fault == "long" else size
        self.send_response(status)
        length = {"Transfer-Encoding": "chunked"} if self._fault == "chunked" else {"Content-Length": str(promised)}
        if self._fault == "last":
            headers["Connection"] = "close"
        for name, value in {**length, "Content-Type": "application/octet-stream", **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        stop = start + size // 2 if self._fault in ("reset", "short", "half") else end
        if content.path is not None and not self._fault and not self.hub.bytes_per_second:
            with content.path.open("rb") as file:
                self.wfile.flush()
                self._asked.sent += self.connection.sendfile(file, start, stop - start)
            return
        for piece in content.pieces(start, stop):
            begun = time.monotonic()
            self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece) if self._fault == "chunked" else piece)
            self._asked.sent += len(piece)
            if self.hub.bytes_per_second:
                time.sleep(max(0.0, len(piece) / self.hub.bytes_per_second - (time.monotonic() - begun)))
            if self._fault == "slow":
                time.sleep(0.05)
        if self._fault == "long":
            self.wfile.write(b"more")
        if self._fault == "chunked":
            self.wfile.write(b"0\r\n\r\n")
        self.wfile.flush()
        if self._fault in ("reset", "short"):
            self.close_connection = True
        if self._fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()

    def reply(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        """Send a whole small answer."""
        self.send_response(status)
        for name, value in {
            "Content-Type": "application/json", "Content-Length": str(len(body)), **(headers or {})
        }.items():  # fmt: skip
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
            self._asked.sent += len(body)

    def _create(self) -> None:
        if not self._may_write():
            return
        asked = json.loads(self._body)
        repo_id = f"{asked.get('organization') or 'me'}/{asked['name']}"
        if repo_id in self.hub.repos:
            self.reply(
                409,
                json.dumps(
                    {"error": "You already created this model repo", "url": f"{self.hub.address}/{repo_id}"}
                ).encode(),
            )
            return
        self.hub.repos[repo_id] = Repo(private=asked.get("visibility") == "private" or bool(asked.get("private")))
        self.hub.repos[repo_id].commit({})
        self.reply(200, json.dumps({"url": f"{self.hub.address}/{repo_id}"}).encode())

    def _may_write(self) -> bool:
        if self._asked.authorization == f"Bearer {self.hub.token}" and self.hub.token:
            return True
        self.reply(401, b'{"error":"Unauthorized"}', {"X-Error-Message": "Unauthorized"})
        return False

    def _batch(self) -> None:
        if not self._may_write():
            return
        objects = []
        for each in json.loads(self._body)["objects"]:
            known = each["oid"] in self.hub.stored
            upload = {"upload": {"href": f"{self.hub.storage}/{each['oid']}?Signature=up", "header": {}}}
            objects.append({"oid": each["oid"], "size": each["size"], **({} if known else {"actions": upload})})
        self.reply(200, json.dumps({"transfer": "basic", "objects": objects}).encode())

    def _upload(self, path: str, length: int) -> None:
        if self._fault == "reset":
            self.rfile.read(length // 2)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            self.close_connection = True
            return
        content = Content.of(self.rfile.read(length))
        if content.sha256 != path.strip("/"):
            self.reply(400, b"another digest")
            return
        self.hub.stored[content.sha256] = content
        self.reply(200, b"")

    def _branch(self, repo: Repo, name: str) -> None:
        if not self._may_write():
            return
        found = repo.at(json.loads(self._body).get("startingPoint", "main"))
        if name in repo.branches or found is None:
            self.reply(409 if found else 404, b'{"error":"no"}')
            return
        repo.branches[name] = [found]
        self.reply(200, b"{}")

    def _commit(self, repo_id: str, repo: Repo, branch: str) -> None:
        if not self._may_write():
            return
        at = repo.at(branch)
        if at is None:
            self._missing("RevisionNotFound")
            return
        sha, files = at
        files, message = dict(files), ""
        for line in self._body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                message = value["summary"]
                if value.get("parentCommit") not in (None, sha):
                    self.reply(
                        412,
                        b'{"error":"A commit has happened since"}',
                        {"X-Error-Message": "A commit has happened since"},
                    )
                    return
            elif entry["key"] == "file":
                files[value["path"]] = Content.of(base64.b64decode(value["content"]))
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.stored[value["oid"]]
            elif entry["key"] == "deletedFile":
                files.pop(value["path"], None)
        is_pull = "create_pr=1" in self.path
        made = f"{len(repo.pulls):040x}" if is_pull else repo.commit(files, message, branch)
        if is_pull:
            repo.pulls["refs/pr/1"] = (made, files)
        answer = {"commitUrl": f"{self.hub.address}/{repo_id}/commit/{made}", "commitOid": made, "success": True}
        if is_pull:
            answer["pullRequestUrl"] = f"{self.hub.address}/{repo_id}/discussions/1"
        self.reply(200, json.dumps(answer).encode())


def _entry(name: str, content: Content) -> dict[str, object]:
    entry: dict[str, object] = {"type": "file", "path": name, "size": content.size, "oid": content.sha1}
    if name.endswith(LARGE):
        entry["lfs"] = {"oid": content.sha256, "size": content.size, "pointerSize": 134}
    return entry


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, *_args: object) -> None:
        pass


@contextmanager
def serving(hub: LoopbackHub) -> Iterator[LoopbackHub]:
    """Serve a Hub and its storage for as long as the block lasts."""
    with _listening(hub, is_storage=False) as hub_port, _listening(hub, is_storage=True) as storage_port:
        hub.address, hub.storage = f"http://127.0.0.1:{hub_port}", f"http://localhost:{storage_port}"
        yield hub


@contextmanager
def storage_over_tls(hub: LoopbackHub, context: ssl.SSLContext) -> Iterator[None]:
    """Let large files come over TLS for as long as the block lasts."""
    before = hub.storage
    with _listening(hub, is_storage=True, context=context) as port:
        hub.storage = f"https://localhost:{port}"
        yield
    hub.storage = before


@contextmanager
def _listening(hub: LoopbackHub, *, is_storage: bool, context: ssl.SSLContext | None = None) -> Iterator[int]:
    handler = type("Bound", (Handler,), {"hub": hub, "is_storage": is_storage})
    server = _Server(("127.0.0.1", 0), handler)
    if context is not None:
        server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
