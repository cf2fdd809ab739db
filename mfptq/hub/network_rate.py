"""Measure how fast a Hub's files come: the connections of a run, for a second. Called by `source`."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from ..checkpoint.reads import SEGMENT_BYTES
from .file_digests import HubFile
from .ranges import RangeReader
from .window import CONNECTIONS

SECONDS = 1.0


class _EnoughError(Exception):
    """The time is over: what is still to come of an answer is not waited for."""


def measured_rate(reader: RangeReader, file: HubFile) -> float:
    """Return how many bytes a second come of a file's first ranges, one for each connection.

    No more than CONNECTIONS * SEGMENT_BYTES are fetched, and an answer that takes longer than SECONDS is not received to its end.
    """
    begun, before = time.monotonic(), reader.fetched

    def fetch(number: int) -> None:
        start = number * SEGMENT_BYTES
        size = min(SEGMENT_BYTES, file.size - start)
        with suppress(_EnoughError):
            reader.read_into(file, start, memoryview(bytearray(size)), stop_in_time)

    def stop_in_time(_filled: int) -> None:
        if time.monotonic() - begun > SECONDS:
            raise _EnoughError

    with ThreadPoolExecutor(CONNECTIONS) as pool:
        list(pool.map(fetch, range(min(CONNECTIONS, -(-file.size // SEGMENT_BYTES)))))
    return (reader.fetched - before) / (time.monotonic() - begun)
