"""Make the parts of a calibration on a Ray cluster: a task for each, which writes a file that a later attempt goes on with.

Called by `cluster.ray_executor`. Tasks carry token ids and settings; statistics go through the shared folder.
"""

from __future__ import annotations

import logging
import pickle
import time
from collections.abc import Collection, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ..errors import quote
from ..observation.calibration_pass import CalibrationProgress, OnProgress, Share
from .attempts import Names, TaskLoop, await_file
from .connection import Answer, Cluster, Ref
from .probing import probe_nodes
from .progress import told

if TYPE_CHECKING:
    from ..observation.calibration_parts import CalibrationOrder, PartsFolder

logger = logging.getLogger(__name__)

PASSING = frozenset({"StorageError"})  # errors that another attempt may better
READ_SECONDS = 1.0  # between two looks at how far the tasks are


class CalibrationRun:
    """The tasks of one calibration. For one thread."""

    def __init__(self, cluster: Cluster, order: CalibrationOrder, folder: PartsFolder, on_event: OnProgress) -> None:
        self._cluster = cluster
        self._order = order
        self._folder = folder
        self._tell = on_event
        self._shares: Mapping[str, Share] = {}
        self._read = 0.0
        self._progress = CalibrationProgress(0, len(order.samples.ids), 0, 0)

    def make_all(self, resources: Mapping[str, Any]) -> None:
        """Make every part that is not whole; raise the first error that another attempt cannot better."""
        from .tasks import calibrate_part

        options = {**asdict(self._order.options), **resources}
        plan = (self._cluster.put(pickle.dumps(self._order.request)), dict(self._order.plan.digests))
        probe_nodes(self._cluster, plan, self._folder.path, self._poll)
        self._shares = self._folder.divided(self._cluster.window())

        def begin(names: Names, avoid: Collection[str]) -> Ref:
            [name] = names
            job = {"path": str(self._folder.path.absolute() / name), "share": pickle.dumps(self._shares[name])}
            return self._cluster.submit(calibrate_part, *plan, job, options, avoid=avoid)

        todo = [(name,) for name in self._shares if not self._folder.is_whole(name)]
        TaskLoop(self._cluster, begin, self._take, self._poll, passing=PASSING, twice=False).finish_all(todo)

    def _take(self, node: str, answer: Answer) -> None:
        """Take in that a node has made a part, once it is seen here whole."""
        name = answer["part"]
        await_file(node, name, lambda: self._folder.is_whole(name), self._poll)
        logger.info("node %s finished %s", node, quote(name))
        self._read = 0.0  # the next look is due at once: it may be the last

    def _poll(self) -> None:
        """Tell how far all tasks are, as they have written it beside their parts."""
        if time.monotonic() > self._read + READ_SECONDS:
            self._read = time.monotonic()
            self._progress = self._sum() or self._progress
        self._tell(self._progress)

    def _sum(self) -> CalibrationProgress | None:
        """Return the progress of all parts together; None before any task has told of its own."""
        known = [numbers for name in self._shares if (numbers := told(self._folder.path / name)) is not None]
        if not known:
            return None
        samples, requested, steps, blocks = (sum(column) for column in zip(*known, strict=True))
        total = len(self._order.samples.ids)
        return CalibrationProgress(samples, total, steps, blocks * total // requested)
