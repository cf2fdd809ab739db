"""Names that training tools put around a model's own: taken off before any rule, fusion or scale looks at a name.

The tensors keep the names that they have in the source.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from ..errors import SourceError, quote

_LEADING = ("module.", "base_model.model.")
_ANYWHERE = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "base_layer"})
_WRAPPED = re.compile(r"_orig_mod|_wrapped_module|base_layer|^module\.|^base_model\.")  # most names have none of these
_ADAPTER = re.compile(r"(?:.*\.)?lora_(?:embedding_)?[AB](?:\.(\w+))?(?:\.weight)?$")
_LEFTOVERS = frozenset({"base_layer", "modules_to_save", "original_module"})


def logical(name: str) -> str:
    """Return a name without what torch.compile, FSDP, DDP, checkpointing and adapters put around a module."""
    if not _WRAPPED.search(name):
        return name
    parts = name.split(".")
    if not _ANYWHERE.isdisjoint(parts):
        name = ".".join([part for part in parts if part not in _ANYWHERE])
    while name.startswith(_LEADING):
        for prefix in _LEADING:
            name = name.removeprefix(prefix)
    return name


def check_merged(names: Collection[str], needed: Collection[str]) -> None:
    """Raise SourceError if an adapter was not merged into its weights.

    `needed` are the names of adapters that belong to the model itself (Phi-4-multimodal's `speech` and `vision`).
    """
    for name in names:
        found = _ADAPTER.match(name)
        parts = set(name.split("."))
        if "parametrizations" in parts:  # adapters that are part of the model (jina-embeddings-v3)
            continue
        if (found and found.group(1) not in needed) or (not needed and not _LEFTOVERS.isdisjoint(parts)):
            raise SourceError(f"{quote(name)} belongs to an adapter that is not merged: merge the adapter first")
