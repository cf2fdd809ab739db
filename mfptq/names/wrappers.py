"""Names that training tools put around a model's own: taken off before any rule, fusion or scale looks at a name.

The tensors keep the names that they have in the source.
"""

from __future__ import annotations

import re

_LEADING = ("module.", "base_model.model.")
_ANYWHERE = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "base_layer"})
_WRAPPED = re.compile(r"_orig_mod|_wrapped_module|base_layer|^module\.|^base_model\.")  # most names have none of these


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
