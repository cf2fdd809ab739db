"""Upload finished shards while later ones are made, and let go of them here where they are not to stay.

`execution.whole_run` uses it for `push_to_hub`. A note in the output's work folder says what is uploaded, so that a rerun
does not make or send it again. Nothing is visible on the Hub before `Publisher.commit`.
"""

from __future__ import annotations

import json
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..checkpoint.strict_json import StrictJsonError, parse_json
from ..errors import HubError
from ..hub.errors import hub_errors
from ..hub.file_digests import HubFile
from ..hub.ranges import RangeReader
from ..storage.files import replace_text
from .claim import REPORT, WORK
from .journal import ShardResult
from .publish import Publisher, Pushed, StoredFile

NOTE = "uploads"
MAX_WAITING = 2  # finished shards that wait for their upload, where each is discarded after it
SHARDS_AT_ONCE = MAX_WAITING + 1  # that lie here then
POLL_SECONDS = 0.1


class Uploads:
    """Uploads by one thread of its own.

    Threads: `add`, `has_room` and `finish` from the caller, `wait_for_room` from workers. `_changed` guards `_queue`, `_busy` and `_error`.
    """

    def __init__(self, publisher: Publisher, *, discard: bool) -> None:
        self._publisher = publisher
        self.discard = discard
        self._changed = threading.Condition()
        self._queue: deque[StoredFile] = deque()
        self._busy = 0
        self._error: BaseException | None = None
        self._closed = False
        self.uploaded = self._trusted()
        self._thread = threading.Thread(target=self._work, name="mfptq-upload", daemon=True)

    def begin(self) -> None:
        """Start uploading; the output's work folder must exist."""
        self._note()
        self._thread.start()

    @property
    def gone(self) -> frozenset[str]:
        """The shards that are uploaded and not here any more."""
        return frozenset(name for name in self.uploaded if not (self._publisher.root / name).exists())

    def commit(self, done: Iterable[ShardResult], sums: Mapping[str, str]) -> Pushed:
        """Make everything visible; `sums` has the SHA-256 of every file."""
        return self._publisher.commit(everything(self._publisher.root, done, sums))

    def add(self, result: ShardResult) -> None:
        """Take a finished shard."""
        if result.name not in self.uploaded:
            with self._changed:
                self._queue.append(StoredFile(result.name, result.sha256, result.size))
                self._changed.notify_all()

    def wait_for_room(self) -> None:
        """Return when another shard may be begun."""
        with self._changed:
            while not self._has_room():
                self._changed.wait(POLL_SECONDS)

    def has_room(self) -> bool:
        """Return whether another shard may be begun."""
        with self._changed:
            return self._has_room()

    def _has_room(self) -> bool:
        """Return whether another shard may be begun: where shards are discarded, few may wait for that."""
        if self._error is not None:
            raise self._error
        return not self.discard or len(self._queue) + self._busy < MAX_WAITING

    def finish(self, poll: Callable[[], object]) -> None:
        """Return when everything is uploaded; raises what went wrong, and what `poll` raises meanwhile."""
        while True:
            with self._changed:
                if self._error is not None:
                    raise self._error
                if not self._queue and not self._busy:
                    return
                self._changed.wait(POLL_SECONDS)
            poll()

    def stop(self) -> None:
        """Begin no other upload; workers that wait go on to their end."""
        with self._changed:
            self._closed = True
            self._error = self._error or HubError("the run was stopped")
            self._changed.notify_all()

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._queue and not self._closed:
                    self._changed.wait()
                if self._closed:
                    return
                file, self._busy = self._queue.popleft(), 1
            try:
                self._publisher.upload(file)
                self.uploaded[file.name] = file
                self._note()
                if self.discard:
                    (self._publisher.root / file.name).unlink()
            except BaseException as error:  # raised by whoever waits next
                with self._changed:
                    self._error = self._error or error
            with self._changed:
                self._busy = 0
                self._changed.notify_all()

    def _note(self) -> None:
        """Write down what is uploaded; a note that is lost only costs another look at the Hub."""
        files = [asdict(each) for each in self.uploaded.values()]
        text = json.dumps({"repo": self._publisher.target.repo_id, "files": files})
        replace_text(self._publisher.root / WORK / NOTE, text)

    def _trusted(self) -> dict[str, StoredFile]:
        """Return what an earlier run uploaded and the Hub still has."""
        try:
            found = parse_json((self._publisher.root / WORK / NOTE).read_bytes())
            files = [StoredFile(str(each["name"]), str(each["sha256"]), int(each["size"])) for each in found["files"]]
        except (OSError, StrictJsonError, KeyError, TypeError, ValueError):
            return {}
        if found.get("repo") != self._publisher.target.repo_id:
            return {}
        return {file.name: file for file in files if self._publisher.trust(file)}


@contextmanager
def uploading(uploads: Uploads | None) -> Iterator[None]:
    """End the uploading thread when the block ends, however it does."""
    try:
        yield
    finally:
        if uploads is not None:
            uploads.stop()


def publishable(publisher: Publisher, digest: str) -> None:
    """Raise HubError where a run of the plan with this digest would refuse to publish; makes nothing."""
    if publisher.look() and published_report(publisher).get("plan") != digest:
        publisher.refuse_foreign()


def published_report(publisher: Publisher) -> Mapping[str, Any]:
    """Return the report that lies in the repo, empty if there is none: what an earlier run has published."""
    entry = publisher.listed.get(REPORT)
    if entry is None or publisher.parent is None:
        return {}
    target, data = publisher.target, bytearray(entry.size)
    file = HubFile(REPORT, entry.size, entry.blob_id, entry.lfs.sha256 if entry.lfs else None)
    with (
        hub_errors("read", target.repo_id, target.revision),
        RangeReader(target.repo_id, publisher.parent, target.token) as reader,
    ):
        reader.read_into(file, 0, memoryview(data))
    try:
        found = parse_json(bytes(data))
    except StrictJsonError:
        return {}
    return found if isinstance(found, dict) else {}


def everything(root: Path, done: Iterable[ShardResult], small: Mapping[str, str]) -> list[StoredFile]:
    """Return all files of an output, shards that are not here any more included; `small` maps the others to digests."""
    shards = [StoredFile(result.name, result.sha256, result.size) for result in done]
    names = {file.name for file in shards}
    return shards + [
        StoredFile(name, digest, (root / name).stat().st_size) for name, digest in small.items() if name not in names
    ]
