"""Refuse checkpoints whose adapters are not merged into their weights.

Called by `planning.building`, before a rule looks at a name.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from ..errors import SourceError, quote

_ADAPTER = re.compile(r"(?:.*\.)?lora_(?:embedding_)?[AB](?:\.(\w+))?(?:\.weight)?$")
_LEFTOVERS = frozenset({"base_layer", "modules_to_save", "original_module"})
# Of DoRA, IA3, LoHa, LoKr, OFT, VeRA and LoRA-FA, as peft names them.
_OTHER_KINDS = re.compile(
    r"(lora_magnitude_vector|ia3_l|hada_[wt]\d|lokr_[wt]\d|oft_[rR]|vera_(lambda|[AB])|randlora_)"
)


def check_merged(names: Collection[str], needed: Collection[str]) -> None:
    """Raise SourceError if an adapter was not merged into its weights.

    `needed` are the names of adapters that belong to the model itself (Phi-4-multimodal's `speech` and `vision`).
    """
    for name in names:
        found = _ADAPTER.match(name)
        parts = set(name.split("."))
        if "parametrizations" in parts:  # adapters that are part of the model (jina-embeddings-v3)
            continue
        if (
            any(_OTHER_KINDS.match(part) for part in parts)
            or (found and found.group(1) not in needed)
            or (not needed and not _LEFTOVERS.isdisjoint(parts))
        ):
            raise SourceError(f"{quote(name)} belongs to an adapter that is not merged: merge the adapter first")
