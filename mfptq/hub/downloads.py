"""Watch how much of a repo has arrived in the client's cache, and write it to the log once a minute.

`hub` calls it while huggingface_hub downloads files whole. The client's own bars are for terminals; this is for logs of jobs. The
files in the cache tell it, whichever way the client fetches them. Whoever wants the lines sets this logger to INFO.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import HubError
from ..sizes import transfer_text
from .file_digests import HubFile

# huggingface_hub is imported where it is used: it takes 0.2 s, and a checkpoint in a folder needs none of it.
logger = logging.getLogger(__name__)

MINUTE = 60.0  # seconds between two lines


@contextmanager
def watched(blobs: Path, list_files: Callable[[], Iterable[HubFile]]) -> Iterator[type | None]:
    """Log how much of some files is in a folder of the client's cache, every MINUTE seconds for as long as the block lasts.

    Lends the class of bars for the client to use instead of its own, None if nobody wants the lines. `list_files` is called by the
    first line, so that short downloads ask the Hub for nothing more.
    """
    if not logger.isEnabledFor(logging.INFO):
        yield None
        return
    ended = threading.Event()
    thread = threading.Thread(target=_watch, args=(blobs, list_files, ended), name="mfptq-watch", daemon=True)
    thread.start()
    try:
        yield _hidden_bar()
    finally:
        ended.set()
        thread.join()


def _watch(blobs: Path, list_files: Callable[[], Iterable[HubFile]], ended: threading.Event) -> None:
    begun, before, files = time.monotonic(), sum(_sizes(blobs).values()), dict[str, int]()
    while not ended.wait(MINUTE):
        with suppress(HubError):  # then there is no total; the download itself says what is wrong
            files = files or {file.etag: file.size for file in list_files()}
        there = _sizes(blobs)
        rate = (sum(there.values()) - before) / (time.monotonic() - begun)
        done = sum(min(size, files.get(etag, size)) for etag, size in there.items() if not files or etag in files)
        logger.info("download: %s", transfer_text(done, max(done, sum(files.values())), rate))


def _sizes(blobs: Path) -> dict[str, int]:
    """Return how many bytes are there of each file, by its etag; one that is not complete has a longer name."""
    sizes = dict[str, int]()
    for path in blobs.glob("*"):
        with suppress(OSError):  # renamed or removed meanwhile
            found = path.stat()
            etag = path.name.partition(".")[0]
            sizes[etag] = max(sizes.get(etag, 0), min(found.st_size, found.st_blocks * 512))
    return sizes


def _hidden_bar() -> type:
    from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]

    class HiddenBar(tqdm):
        """A bar that is not drawn: lines and bars would run into each other."""

        def __init__(self, *arguments: object, **options: object) -> None:
            super().__init__(*arguments, **{**options, "disable": True})  # type: ignore[no-untyped-call]

    return HiddenBar
