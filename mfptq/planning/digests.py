"""Name what the output of a plan depends on, so that a resumed run can say what changed.

Called by `building`. Two plans with equal digests make the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..checkpoint.folder import Checkpoint
    from ..smoothing.plan import Smoothing
    from .weight_targets import ChosenTargets

PLAN_FORMAT = 7


def digests_of(
    checkpoint: Checkpoint, decided: tuple[str, str], found: ChosenTargets, smoothing: Smoothing | None
) -> dict[str, str]:
    """Return what the output depends on by name; `decided` is the method and the text of config.json."""
    source, scales = [(each.name, each.size, each.digest) for each in checkpoint.shards], found.input_scales
    return {
        "format": str(PLAN_FORMAT),
        "source": sha256(json.dumps(source)),
        **({} if checkpoint.origin.revision is None else {"commit": checkpoint.origin.revision}),
        "settings": sha256(json.dumps(decided)),
        "input scales": scales.digest if scales is not None else "",
        **({} if found.calibration is None else {"calibration": found.calibration.digest}),
        **found.carried.digests,
        **({"cast": sha256("\n".join(sorted(found.cast)))} if found.cast else {}),
        **({"smoothing": smoothing.digest} if smoothing is not None and smoothing.powers else {}),
    }


def sha256(text: str) -> str:
    """Return the SHA-256 of a text, hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()
