"""Take off the names that training tools put around a model's own, before any rule, fusion or scale looks at a name.

Called by all that decides by name. The tensors of an output keep the names that they have in the source.
"""

from __future__ import annotations

_LEADING = ("module.", "base_model.model.")
_ANYWHERE = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "base_layer"})


def logical(name: str) -> str:
    """Return a name without what torch.compile, FSDP, DDP, checkpointing and adapters put around a module."""
    if (
        "_orig_mod" not in name and "_wrapped_module" not in name and "base_layer" not in name
    ):  # most names: ask quickly
        return _led(name)
    return _led(".".join([part for part in name.split(".") if part not in _ANYWHERE]))


def _led(name: str) -> str:
    while name.startswith(_LEADING):
        for prefix in _LEADING:
            name = name.removeprefix(prefix)
    return name
