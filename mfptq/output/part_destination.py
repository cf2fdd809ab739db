"""Open an output folder to make some of its shards, beside other machines that make the others.

Called by `execution.partial_run`. Takes no lock, removes nothing that another machine may be writing, and writes nothing but
shards and their records: index, companions and config.json are written by whoever finishes the output.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from ..errors import DestinationExistsError, quote
from ..storage.files import storage_errors
from .claim import WORK, OutputClaim
from .destination import Destination, check_apart, check_space, create_folders, inspect_output
from .leftovers import intact, remove_stale
from .parts import PartRecords


@contextmanager
def open_part(
    root: Path, claim: OutputClaim, shards: Collection[str], poll: Callable[[], object] | None = None
) -> Iterator[Destination]:
    """Lend the output folder for some of its shards; `done` holds those of them that are finished and intact.

    `claim` is of the whole output. Raises DestinationExistsError, PlanMismatchError or StorageError before touching anything.
    """
    own = replace(claim, shards={name: claim.shards[name] for name in shards})
    with storage_errors("read folder", root):
        check_apart(root, claim.source)
        found = inspect_output(root, own, overwrite=False)
        if found.digests is None and root.is_dir() and set(os.listdir(root)) - {WORK}:  # noqa: PTH208 - names are data
            raise DestinationExistsError(
                f"output {quote(root)} holds what another run has left: choose another folder, or convert without parts"
            )
        check_space(root, own, found.done)
    create_folders(root)
    records = PartRecords(root / WORK, claim.digests, claim.files)
    records.begin()
    found = inspect_output(root, own, overwrite=False)  # of two plans that begin at once, one goes on
    remove_stale(records.temporaries, alone=False)
    done = intact(root, own, {name: found.done[name] for name in own.shards if name in found.done}, poll)
    for result in done.values():
        records.record(result)  # those that a run without parts had finished
    yield Destination(root, records, done, records.temporaries)
