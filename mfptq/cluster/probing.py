"""Check, before any work, that every node of a cluster can take part.

Called by `cluster.ray_executor` and `cluster.calibrating`. Leaves nothing in the output's folder.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from .. import errors
from .._version import __version__
from ..errors import DestinationError, MfptqError, UsageError, quote
from ..output.claim import WORK
from ..storage.files import storage_errors
from .connection import Answer, Cluster, Node, TaskLostError

PROBE_SECONDS = 300
POLL_SECONDS = 0.2


def error_of(node: str, answer: Answer) -> MfptqError:
    """Return the error that a node has answered with, as one line with the node's name."""
    kind = getattr(errors, answer["error"], MfptqError)
    kind = DestinationError if kind is errors.StorageError else kind
    made: MfptqError = kind(f"node {quote(node)}: {answer['message']}")
    return made


def probe_nodes(cluster: Cluster, plan: tuple[Any, ...], root: Path, poll: Callable[[], object]) -> None:
    """Raise the error of the first node that has another version, reads another plan, or does not share the folders.

    `plan` is what a task gets of it: the request as stored in the cluster, and the digests. `root` is the output's folder.
    """
    from .tasks import probe

    token = f"probe.{secrets.token_hex(8)}"
    folder = root.absolute() / WORK
    with storage_errors("write into", folder):
        (folder / token).touch()
    try:
        asked = {cluster.submit_on(node, probe, *plan, str(folder), token): node for node in cluster.nodes()}
        end = time.monotonic() + PROBE_SECONDS
        while asked:
            for ref in cluster.wait(asked, POLL_SECONDS):
                _check(cluster, ref, asked.pop(ref), root)
            if time.monotonic() > end:
                raise UsageError(f"node {quote(next(iter(asked.values())).name)} did not answer in {PROBE_SECONDS} s")
            poll()
    finally:
        for path in folder.glob(f"{token}*"):
            with suppress(OSError):
                path.unlink()


def _check(cluster: Cluster, ref: Any, node: Node, root: Path) -> None:
    try:
        _, answer = cluster.answer(ref)
    except TaskLostError:
        return  # a node that has just died takes no part
    if not answer["ok"]:
        raise error_of(node.name, answer)
    if answer["version"] != __version__:
        raise UsageError(f"node {quote(node.name)} has mfptq {answer['version']}, this machine {__version__}")
    if not (root / WORK / answer["seen"]).exists():
        raise DestinationError(
            f"node {quote(node.name)} has a folder {quote(root)} of its own: the output must be shared"
        )
