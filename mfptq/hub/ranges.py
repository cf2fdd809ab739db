"""Fetch byte ranges of a Hub repo's files over HTTP, with the session, headers and redirects of huggingface_hub.

`source` calls it from several threads. A file's address is asked for once; the ranges are read from there. The client makes
the first request to a host, and `connections` those that follow. Whatever passes (timeouts, broken connections, 429, 5xx, an
address that ran out) is tried again from the byte that was reached. Bytes are taken only from an answer that says exactly which
they are. A token goes only to the host that the client itself would send it to.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from ..errors import HubError, SourceChangedError, quote
from .answers import MOVED, PASSING, Headers, TransientError, check_place, check_status, etag, requested_wait, too_long
from .connections import Connection, Connections, UnusableError, received
from .errors import hub_errors, reason
from .file_digests import HubFile

# huggingface_hub is imported where it is used: it takes 0.2 s, and a checkpoint in a folder needs none of it.
logger = logging.getLogger(__name__)

MAX_TRIES = 6  # without a byte in between
FIRST_WAIT, LONGEST_WAIT = 1.0, 8.0  # seconds
LONGEST_REQUESTED_WAIT = 330.0  # seconds; the Hub counts requests by five minutes


@dataclass(slots=True)
class _Address:
    """Where a file's bytes are, and what the server there calls them; `lock` is held while that is being asked."""

    url: str = ""
    etag: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)


@dataclass(frozen=True, slots=True)
class _Part:
    """A request to be made: fill `buffer` from byte `start` of a file, which is at `url`, as `address` says or said."""

    file: HubFile
    address: _Address
    url: str
    start: int
    buffer: memoryview

    @property
    def place(self) -> tuple[int, int]:
        """Its first byte and its length."""
        return self.start, len(self.buffer)


class RangeReader:
    """Ranges of the files of one repo at one commit; safe to use from several threads.

    `fetched` counts bytes of bodies, `requests` counts requests.
    """

    def __init__(self, repo_id: str, revision: str, token: str | None = None) -> None:
        self.repo_id = repo_id
        self.revision = revision
        self.fetched = 0
        self.requests = 0
        self._token = token
        self._addresses: dict[str, _Address] = {}
        self._lock = threading.Lock()  # guards the counts and the table of addresses
        self._stopped = threading.Event()
        self._connections = Connections()

    def __enter__(self) -> RangeReader:
        """Return itself: it is stopped at the end of the block."""
        return self

    def __exit__(self, *_exception: object) -> None:
        """Stop."""
        self.stop()

    def read_into(
        self, file: HubFile, offset: int, buffer: memoryview, note: Callable[[int], None] | None = None
    ) -> None:
        """Fill `buffer` from byte `offset` of a file; `note` is told how many bytes are there.

        Raises HubError, and SourceChangedError if the file is not what the listing says.
        """
        filled = failures = 0
        while filled < len(buffer):
            self._go_on()
            try:
                with hub_errors("read", self.repo_id, self.revision):
                    for count in self._received(file, offset + filled, buffer[filled:]):
                        filled += count
                        failures = 0
                        if note is not None:
                            note(filled)
                if filled < len(buffer):
                    raise TransientError("the answer ended early")
            except TransientError as failure:
                failures += 1
                self._wait_after(failure, failures, file.name)

    def stop(self) -> None:
        """Let every read fail at once or soon, and give the client its connections back."""
        self._stopped.set()
        self._connections.close()

    def _wait_after(self, failure: TransientError, failures: int, name: str) -> None:
        """Wait before another try, or raise HubError where there were too many."""
        self._go_on()
        if failures >= MAX_TRIES:
            raise HubError(
                f"cannot read {quote(name)} of {quote(self.repo_id)} after {failures} tries: {failure}; "
                "rerun the same command to resume"
            ) from None
        wait = min(LONGEST_WAIT, FIRST_WAIT * 2 ** (failures - 1)) if failure.wait is None else failure.wait
        logger.warning("%s: %s; trying again in %.0f s", quote(name), failure, wait)
        self._stopped.wait(min(wait, LONGEST_REQUESTED_WAIT))

    def _go_on(self) -> None:
        if self._stopped.is_set():
            raise HubError("the run was stopped")

    def _received(self, file: HubFile, start: int, buffer: memoryview) -> Iterator[int]:
        """Fill a buffer from byte `start` on; yield how many bytes were added. Raises TransientError for what may be tried again."""
        address, url = self._address(file)
        part = _Part(file, address, url, start, buffer)
        try:
            with self._connections.lent(url) as connection:
                if connection is not None:
                    yield from self._by_connection(connection, part)
                    return
        except UnusableError:  # and no byte has come
            self._go_on()
        yield from self._by_client(part)

    def _by_connection(self, connection: Connection, part: _Part) -> Iterator[int]:
        """Ask on a connection that the client has opened before."""
        try:
            answer = connection.ask(part.url, part.start, part.start + len(part.buffer))
            self._count(requests=1)
            self._check_status(answer.status, answer.headers, part)
            if answer.status not in (200, 206):
                raise UnusableError  # the client knows what to make of it
            self._check_place(answer.status, answer.headers, part)
            for count in received(answer, part.buffer):
                self._count(fetched=count)
                yield count
        except OSError as error:
            raise TransientError(reason(error)) from None

    def _by_client(self, part: _Part) -> Iterator[int]:
        """Ask with huggingface_hub's client, and keep the connection that it has opened."""
        from huggingface_hub import constants, errors
        from huggingface_hub.utils import get_session  # type: ignore[attr-defined]

        session, (start, size) = get_session(), part.place
        headers = {"Range": f"bytes={start}-{start + size - 1}", "Accept-Encoding": "identity"}
        headers |= self._authorization(part.url)
        try:
            request = session.build_request("GET", part.url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT)
            yield from self._answered(session.send(request, stream=True), part)
        except errors.HfHubHTTPError:
            raise
        except errors.HTTPError as error:  # type: ignore[attr-defined]  # timeouts, resets, connections that end early
            raise TransientError(reason(error)) from None

    def _answered(self, response: Any, part: _Part) -> Iterator[int]:
        """Receive an answer of the client; its connection is kept once the last byte is read, and closed otherwise."""
        from huggingface_hub.utils import hf_raise_for_status  # type: ignore[attr-defined]

        done, is_kept = 0, False
        try:
            self._count(requests=1)
            self._check_status(response.status_code, response.headers, part)
            if response.status_code >= 400:
                response.read()
                hf_raise_for_status(response)
            self._check_place(response.status_code, response.headers, part)
            body = response.iter_raw()
            for data in body:
                self._go_on()
                self._count(fetched=len(data))
                if done + len(data) > len(part.buffer):
                    raise too_long(part.file)
                part.buffer[done : done + len(data)] = data
                done += len(data)
                is_kept = done == len(part.buffer) and self._connections.adopt(response, body)
                yield len(data)
                if is_kept:
                    return
        finally:
            if not is_kept:
                response.close()

    def _check_status(self, status: int, headers: Headers, part: _Part) -> None:
        """Raise for a status that may pass; where an address's time is over, the next try asks for another one."""
        check_status(status, headers, part.file)
        if status in MOVED and part.url != self._resolve_url(part.file):
            with part.address.lock:
                part.address.url = part.address.url if part.address.url != part.url else ""
            raise TransientError(f"HTTP status {status}", 0.0)

    def _check_place(self, status: int, headers: Headers, part: _Part) -> None:
        """Raise unless an answer holds the bytes that were asked for, of the same content as the answers before."""
        check_place(status, headers, part.file, part.place)
        found, address = etag(headers), part.address
        if address.etag and found and found != address.etag:
            raise SourceChangedError(f"{quote(part.file.name)} changed on the Hub while it was being read: start again")
        address.etag = address.etag or found

    def _address(self, file: HubFile) -> tuple[_Address, str]:
        """Return where a file's bytes are, asked for once for all threads, with the address of now."""
        with self._lock:
            address = self._addresses.setdefault(file.name, _Address())
        with address.lock:
            if not address.url:
                address.url = self._resolve(file)
            return address, address.url

    def _resolve(self, file: HubFile) -> str:
        from huggingface_hub import constants, errors, get_hf_file_metadata

        url = self._resolve_url(file)
        self._count(requests=1)
        try:
            found = get_hf_file_metadata(url, token=self._token, timeout=constants.HF_HUB_ETAG_TIMEOUT)
        except errors.HfHubHTTPError as error:
            if error.response.status_code in PASSING:
                text = f"HTTP status {error.response.status_code}"
                raise TransientError(text, requested_wait(error.response.headers)) from None
            raise
        except errors.HTTPError as error:  # type: ignore[attr-defined]
            raise TransientError(reason(error)) from None
        if found.commit_hash not in (None, self.revision):
            raise SourceChangedError(f"{quote(file.name)} is of another commit than {self.revision}: start again")
        if (found.etag is not None and found.etag != file.etag) or found.size not in (None, file.size):
            raise SourceChangedError(
                f"{quote(file.name)} is another file on the Hub than its listing says: start again"
            )
        return found.location

    def _resolve_url(self, file: HubFile) -> str:
        from huggingface_hub import hf_hub_url

        return hf_hub_url(self.repo_id, file.name, revision=self.revision)

    def _authorization(self, url: str) -> Mapping[str, str]:
        """Return the headers of the client; the token only for the Hub's own host."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

        own = urlsplit(hf_hub_url(self.repo_id, "x"))
        is_hub = urlsplit(url)[:2] == own[:2]
        return build_hf_headers(token=self._token if is_hub else False)

    def _count(self, *, fetched: int = 0, requests: int = 0) -> None:
        with self._lock:
            self.fetched += fetched
            self.requests += requests
