"""Ask for further ranges on connections that the Hub's client has opened, and receive them straight into their place.

`ranges` makes the first request to a host with huggingface_hub's client, and hands its connection over here once that answer was
read to its last byte. What the client has settled stays so: the way there (proxies, certificates, timeouts), the headers, and
whether a token is sent. Later requests are the same one for another range, on the same connection. The client's own reading takes
some hundred microseconds of Python for every 16 to 64 KB; this takes one call for whatever has arrived. Where it is not possible
(HTTP/2, a proxy for plain HTTP, TLS inside of a proxy's TLS, a client that shows no socket), or a host does not answer so, all goes the client's way.
"""

from __future__ import annotations

import select
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

if TYPE_CHECKING:  # else imported where used: they take 25 ms, and a source in a folder needs neither
    from http.client import HTTPResponse

TOLD_BYTES = 2**17  # TLS brings 16 kB at a time


class UnusableError(Exception):
    """A connection brings no answer that can be read here: ask with the client."""


class Connection:
    """A connection to one host. It belongs to the client, for which its first answer has not ended until `close`.

    `body` is the iterator over that answer's body: the client would close the connection with it.
    """

    def __init__(self, response: Any, body: Iterator[bytes], opened: socket.socket) -> None:
        from http.client import HTTPConnection

        request = response.request
        self._response, self._body = response, body
        self._socket = opened
        self._parse_url = type(request.url)
        self._headers = [(name, value) for name, value in request.headers.multi_items() if name.lower() != "range"]
        self._requests = HTTPConnection(request.url.host)
        self._requests.sock = opened
        self._requests.auto_open = 0  # another connection would not be the client's
        self._answer: HTTPResponse | None = None

    @property
    def is_quiet(self) -> bool:
        """Whether it is open and nothing has come unasked: a host that closes a connection shows so."""
        poll = select.poll()
        try:
            poll.register(self._socket, select.POLLIN)
        except ValueError:  # the client has closed it, with all its connections
            return False
        return not poll.poll(0)

    def ask(self, url: str, start: int, end: int) -> HTTPResponse:
        """Ask for bytes `start` to `end` of an address of the same host; its body is for `received`.

        Raises UnusableError if no answer comes, or one of unknown length, and TimeoutError.
        """
        from http.client import HTTPException

        target = self._parse_url(url).raw_path.decode("ascii")
        try:
            self._requests.putrequest("GET", target, skip_host=True, skip_accept_encoding=True)
            for name, value in self._headers:
                self._requests.putheader(name, value)
            self._requests.putheader("Range", f"bytes={start}-{end - 1}")
            self._requests.endheaders()
            self._answer = answer = self._requests.getresponse()
        except TimeoutError:
            raise
        except (OSError, HTTPException) as error:  # closed by the host meanwhile, or not HTTP
            raise UnusableError from error
        if answer.chunked or answer.length is None:
            raise UnusableError
        return answer

    def stop(self) -> None:
        """End what is being received in another thread, at once."""
        with suppress(OSError):
            socket.socket.shutdown(self._socket, socket.SHUT_RDWR)  # an SSLSocket's own would read on without TLS

    def close(self) -> None:
        """Give the connection back to the client, which closes it."""
        if self._answer is not None:
            self._answer.close()
        self._response.close()


class Connections:
    """The connections to keep, by host; safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards all below
        self._idle: dict[tuple[str, str], list[Connection]] = {}
        self._lent: set[Connection] = set()
        self._closed = False

    @contextmanager
    def lent(self, url: str) -> Iterator[Connection | None]:
        """Lend an idle connection to the host of an address, None if there is none; it is closed unless the block ends well."""
        connection = self._take(_host(url))
        try:
            yield connection
        except BaseException:
            self._forget(connection)
            raise
        self._put_back(_host(url), connection)

    def adopt(self, response: Any, body: Iterator[bytes]) -> bool:
        """Keep the connection of an answer that was read to the last byte of its body, if it can be used; return whether."""
        opened = None if self._closed else _socket(response)
        if opened is None:
            return False
        self._put_back(_host(str(response.request.url)), Connection(response, body, opened))
        return True

    def close(self) -> None:
        """End every transfer, and keep no connection from now on."""
        with self._lock:
            self._closed = True
            idle = [each for connections in self._idle.values() for each in connections]
            self._idle.clear()
            for connection in self._lent:
                connection.stop()
        for connection in idle:
            connection.close()

    def _take(self, host: tuple[str, str]) -> Connection | None:
        while True:
            with self._lock:
                idle = self._idle.get(host)
                if not idle:
                    return None
                connection = idle.pop()
                self._lent.add(connection)
            if connection.is_quiet:
                return connection
            self._forget(connection)

    def _put_back(self, host: tuple[str, str], connection: Connection | None) -> None:
        if connection is None:
            return
        with self._lock:
            self._lent.discard(connection)
            if not self._closed:
                self._idle.setdefault(host, []).append(connection)
                return
        connection.close()

    def _forget(self, connection: Connection | None) -> None:
        if connection is not None:
            with self._lock:
                self._lent.discard(connection)
            connection.close()


def received(answer: HTTPResponse, buffer: memoryview) -> Iterator[int]:
    """Fill a buffer from an answer, to the end of one of them; yield how many bytes were added, some TOLD_BYTES at a time.

    Raises OSError, after the bytes before it were told.
    """
    done, size = 0, min(len(buffer), answer.length or 0)
    while done < size:
        added, error = _add(answer, buffer[done:size])
        if added:
            done += added
            yield added
        if error is not None:
            raise error
        if not added:
            break
    answer.close()


def _add(answer: HTTPResponse, room: memoryview) -> tuple[int, OSError | None]:
    """Receive until TOLD_BYTES or more are there, or the room is full, or nothing more comes, for the reason returned."""
    added = 0
    try:
        while added < min(TOLD_BYTES, len(room)) and (count := answer.fp.readinto1(room[added:])):
            added += count
    except OSError as error:
        return added, error
    return added, None


def _host(url: str) -> tuple[str, str]:
    return urlsplit(url)[:2]


def _socket(response: Any) -> socket.socket | None:
    """Return the socket whose next bytes are those of the next answer, or None."""
    import ssl

    stream = response.extensions.get("network_stream")
    is_last = "close" in response.headers.get("Connection", "").lower()
    if stream is None or response.http_version != "HTTP/1.1" or response.history or is_last:
        return None
    if isinstance(stream.get_extra_info("ssl_object"), ssl.SSLObject):  # the socket's own TLS is that of a proxy
        return None
    opened, url = stream.get_extra_info("socket"), response.request.url
    if not isinstance(opened, socket.socket):
        return None
    if url.scheme == "https":
        return opened if isinstance(opened, ssl.SSLSocket) else None
    with suppress(OSError):  # closed by now
        if opened.getpeername()[1] == (url.port or 80):  # else it is a proxy's, which wants whole addresses
            return opened
    return None
