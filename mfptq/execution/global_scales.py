"""Find the global scale of each large fused group once, and hand it to every shard that waits for it.

Called by `execution.engine`: `begin` for each shard that holds a part of a group, `found` for each tile.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from ..checkpoint.weights import Weight
from ..nvfp4 import minmax_global_scale, search_global_scale

ScaleWaiter = Callable[[float], None]
ScaleRule = Callable[[float, str], float]


@dataclass(slots=True)
class AmaxSearch:
    """A group whose largest magnitude is being found: `left` tiles are still to be read.

    `scale_of` gives the scale for a largest magnitude and the group's dtype.
    """

    members: Sequence[Weight]
    left: int
    scale_of: ScaleRule
    amax: float = 0.0
    scale: float | None = None
    waiting: list[ScaleWaiter] = field(default_factory=list)


def global_scale(method: str, amax: float, dtype: str) -> float:
    """Return the global scale that a fused group of that dtype shares."""
    return minmax_global_scale(amax, dtype) if method == "minmax" else search_global_scale(amax)


def common_dtype(dtypes: Iterable[str]) -> str:
    """Return the dtype that a fused group is computed in: float32 where its members have different ones."""
    found = set(dtypes)
    return found.pop() if len(found) == 1 else "F32"


def scalar(value: float) -> bytes:
    """Return a value as a float32 tensor of one element."""
    return struct.pack("<f", value)


class GlobalScales:
    """The state of every group that was begun; safe to use from several threads."""

    def __init__(self) -> None:
        self._groups: dict[str, AmaxSearch] = {}
        self._lock = threading.Lock()
        self._settled = threading.Condition(self._lock)
        self._searching = 0

    @property
    def is_searching(self) -> bool:
        """Whether the scale of any group that was begun is not known yet."""
        return self._searching > 0

    def wait(self, seconds: float) -> None:
        """Wait until the scale of a group is found, so long at most."""
        with self._lock:
            if self._searching:
                self._settled.wait(seconds)

    def begin(self, name: str, search: AmaxSearch, waiter: ScaleWaiter) -> bool:
        """Call `waiter` with the group's scale as soon as it is known; return whether the caller must find it."""
        with self._lock:
            group = self._groups.setdefault(name, search)
            self._searching += group is search
            if group.scale is None:
                group.waiting.append(waiter)
                return group is search
        waiter(group.scale)
        return False

    def found(self, name: str, amax: float) -> None:
        """Note one tile's largest magnitude; the last tile of a group settles its scale and calls who waits."""
        with self._lock:
            group = self._groups[name]
            group.amax = max(group.amax, amax)
            group.left -= 1
            if group.left:
                return
            group.scale = group.scale_of(group.amax, common_dtype(weight.dtype for weight in group.members))
            waiting, group.waiting = group.waiting, []
            self._searching -= 1
            self._settled.notify_all()
        for waiter in waiting:
            waiter(group.scale)
