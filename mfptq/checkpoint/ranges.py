"""Fetch byte ranges of a Hub repo's files over HTTP, with the session, headers and redirects of huggingface_hub.

`hub_source` calls it from several threads. A file's address is asked for once; the ranges are read from there. Whatever passes
(timeouts, broken connections, 429, 5xx, an address that ran out) is tried again from the byte that was reached. Bytes are taken
only from an answer that says exactly which they are. A token goes only to the host that the client itself would send it to.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

from ..errors import HubError, SourceChangedError, quote
from .file_digests import HubFile
from .hub_errors import hub_errors, reason

logger = logging.getLogger(__name__)

MAX_TRIES = 6  # without a byte in between
FIRST_WAIT, LONGEST_WAIT = 1.0, 8.0  # seconds
LONGEST_REQUESTED_WAIT = 330.0  # seconds; the Hub counts requests by five minutes
PASSING = {408, 425, 429, 500, 502, 503, 504}
_MOVED = {401, 403, 404, 410}  # what a signed address says when its time is over
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")
_RATE_LIMIT = re.compile(r"\bt=(\d+)")


@dataclass(slots=True)
class _Address:
    """Where a file's bytes are, and what the server there calls them; `lock` is held while that is being asked."""

    url: str = ""
    etag: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)


class _TransientError(Exception):
    """A failure that another try may not meet; `wait` in seconds, where the server named one."""

    def __init__(self, text: str, wait: float | None = None) -> None:
        super().__init__(text)
        self.wait = wait


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

    def read_into(
        self, file: HubFile, offset: int, buffer: memoryview, note: Callable[[int], None] | None = None
    ) -> None:
        """Fill `buffer` from byte `offset` of a file; `note` is told how many bytes are there.

        Raises HubError, and SourceChangedError if the file is not what the listing says.
        """
        filled = failures = 0
        while filled < len(buffer):
            if self._stopped.is_set():
                raise HubError("the run was stopped")
            try:
                with hub_errors("read", self.repo_id, self.revision):
                    for data in self._body(file, offset + filled, len(buffer) - filled):
                        buffer[filled : filled + len(data)] = data
                        filled += len(data)
                        failures = 0
                        if note is not None:
                            note(filled)
                if filled < len(buffer):
                    raise _TransientError("the answer ended early")
            except _TransientError as failure:
                failures += 1
                self._wait_after(failure, failures, file.name)

    def stop(self) -> None:
        """Let every read fail soon."""
        self._stopped.set()

    def _wait_after(self, failure: _TransientError, failures: int, name: str) -> None:
        """Wait before another try, or raise HubError where there were too many."""
        if failures >= MAX_TRIES:
            raise HubError(
                f"cannot read {quote(name)} of {quote(self.repo_id)} after {failures} tries: {failure}; "
                "rerun the same command to resume"
            ) from None
        wait = min(LONGEST_WAIT, FIRST_WAIT * 2 ** (failures - 1)) if failure.wait is None else failure.wait
        logger.warning("%s: %s; trying again in %.0f s", quote(name), failure, wait)
        self._stopped.wait(min(wait, LONGEST_REQUESTED_WAIT))

    def _body(self, file: HubFile, start: int, size: int) -> Any:
        """Yield the bytes of a range, checked, as they come; raises _TransientError for what may be tried again."""
        from huggingface_hub import constants, errors
        from huggingface_hub.utils import get_session  # type: ignore[attr-defined]

        address = self._address(file)
        headers = {"Range": f"bytes={start}-{start + size - 1}", "Accept-Encoding": "identity"}
        headers |= self._authorization(address.url)
        left = size
        try:
            with get_session().stream(
                "GET", address.url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT
            ) as response:
                self._count(requests=1)
                self._check(response, file, address, (start, size))
                for data in response.iter_raw():
                    self._count(fetched=len(data))
                    if len(data) > left:
                        raise SourceChangedError(f"{quote(file.name)}: the Hub sent more bytes than asked for")
                    left -= len(data)
                    yield data
        except errors.HfHubHTTPError:
            raise
        except errors.HTTPError as error:  # type: ignore[attr-defined]  # timeouts, resets, connections that end early
            raise _TransientError(reason(error)) from None

    def _check(self, response: Any, file: HubFile, address: _Address, place: tuple[int, int]) -> None:
        """Raise unless an answer holds exactly the bytes (start, size) of the file that the listing names."""
        from huggingface_hub.utils import hf_raise_for_status  # type: ignore[attr-defined]

        status, (start, size) = response.status_code, place
        if status in PASSING:
            raise _TransientError(f"HTTP status {status}", requested_wait(response.headers))
        if status in _MOVED and address.url != self._resolve_url(file):
            address.url = ""  # signed for a time that is over: ask again
            raise _TransientError(f"HTTP status {status}", 0.0)
        if status == 416:
            raise SourceChangedError(f"{quote(file.name)} is shorter on the Hub than its listing says")
        if status >= 400:
            response.read()
            hf_raise_for_status(response)
        found = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
        if status == 206 and found is not None:
            first, last, total = map(int, found.groups())
            if total != file.size:
                raise SourceChangedError(
                    f"{quote(file.name)} has {total} bytes on the Hub, its listing says {file.size}"
                )
            right = (first, last) == (start, start + size - 1)
        else:
            right = status == 200 and size == file.size and _length(response.headers) in (None, size)
        if not right or response.headers.get("Content-Encoding", "identity") != "identity":
            raise HubError(
                f"{quote(file.name)}: the server does not answer byte ranges as asked for; download the repo whole instead"
            )
        etag = _plain(response.headers.get("ETag", ""))
        if address.etag and etag and etag != address.etag:
            raise SourceChangedError(f"{quote(file.name)} changed on the Hub while it was being read: start again")
        address.etag = address.etag or etag

    def _address(self, file: HubFile) -> _Address:
        """Return where a file's bytes are, asked for once for all threads."""
        with self._lock:
            address = self._addresses.setdefault(file.name, _Address())
        with address.lock:
            if not address.url:
                address.url = self._resolve(file)
        return address

    def _resolve(self, file: HubFile) -> str:
        from huggingface_hub import constants, errors, get_hf_file_metadata

        url = self._resolve_url(file)
        self._count(requests=1)
        try:
            found = get_hf_file_metadata(url, token=self._token, timeout=constants.HF_HUB_ETAG_TIMEOUT)
        except errors.HfHubHTTPError as error:
            if error.response.status_code in PASSING:
                text = f"HTTP status {error.response.status_code}"
                raise _TransientError(text, requested_wait(error.response.headers)) from None
            raise
        except errors.HTTPError as error:  # type: ignore[attr-defined]
            raise _TransientError(reason(error)) from None
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


def requested_wait(headers: Mapping[str, str]) -> float | None:
    """Return how many seconds a server asks to wait, or None if it does not say."""
    text = headers.get("Retry-After", "").strip()
    if text.isdigit():
        return float(text)
    if text:
        try:
            return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
        except ValueError:
            return None
    found = _RATE_LIMIT.search(headers.get("RateLimit", ""))
    return float(found[1]) if found else None


def _length(headers: Mapping[str, str]) -> int | None:
    text = headers.get("Content-Length", "")
    return int(text) if text.isdigit() else None


def _plain(etag: str) -> str:
    """Return an ETag without its quotes and the mark of a weak one."""
    return etag.removeprefix("W/").strip('"')
