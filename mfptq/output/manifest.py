"""Compare the files of an output folder with its SHA256SUMS, on all cores.

Called by `verification`, `output.finished` and `output.publish`. Nothing here writes.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

from ..errors import SourceError
from ..limits import MAX_INDEX_BYTES
from ..storage.digest import file_sha256
from ..storage.files import confined, open_regular, read_small
from ..storage.parallel import Stopped, in_parallel
from .claim import CARD, MANIFEST
from .fault import Fault


def manifest_entries(root: Path) -> dict[str, str] | None:
    """Return the SHA-256 of every file by name, hexadecimal, as the manifest has it; None for a malformed manifest."""
    *lines, rest = read_small(confined(root, MANIFEST), MAX_INDEX_BYTES).decode(errors="replace").split("\n")
    entries = {line[66:]: line[:64] for line in lines}
    if rest or any(line[64:66] != "  " for line in lines) or len(entries) < len(lines):
        return None
    return entries


def manifest_faults(
    root: Path, poll: Callable[[], object] | None = None, note: Callable[[int], object] | None = None
) -> tuple[int, list[Fault]]:
    """Return how many digests were compared, and a fault for each file that is missing or has another content.

    `poll` is called now and then in the calling thread; what it raises stops the comparison. `note` is told, in other threads,
    how many more bytes are done.
    """
    entries = manifest_entries(root)
    if entries is None:
        return 0, [Fault("", MANIFEST, "has a line that is no digest, two spaces and a name, or a name twice")]
    found = in_parallel(partial(_digest_fault, root, note), entries.items(), poll)
    return len(entries), [fault for fault in found if fault is not None]


def _digest_fault(
    root: Path, note: Callable[[int], object] | None, stopped: Stopped, entry: tuple[str, str]
) -> Fault | None:
    name, digest = entry
    try:
        fd = open_regular(confined(root, name))
    except SourceError as error:
        return Fault("", MANIFEST, f"names a file that cannot be read: {error}")
    try:
        is_edited_by_people = name == CARD
        if not is_edited_by_people and file_sha256(fd, os.fstat(fd).st_size, stopped, note) != digest:
            return Fault("", name, f"is not what {MANIFEST} says: its content changed")
    finally:
        os.close(fd)
    return None
