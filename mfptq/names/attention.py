"""Find attention layers by name: the modules that make keys, and the layer that a scale of the key-value cache belongs to.

Called by `planning.cache_scales`, `encodings.contents`, `observation` and what reads outputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

CACHE_SCALES: Final = ("k_scale", "v_scale")  # as engines look for them below `<attention>.`
_KEYS: Final = ("k_proj", "qkv_proj")
_INSIDE: Final = ("k_proj", "v_proj", "qkv_proj", "attn", *CACHE_SCALES, "kv_scale")


def key_modules(modules: Iterable[str]) -> Iterator[str]:
    """Yield the modules that make keys, apart or together with queries and values."""
    return (module for module in modules if module.rpartition(".")[2] in _KEYS)


def attention_of(name: str) -> str:
    """Return the attention layer of a module in it, or of a scale, wherever tools put those: `<attention>.k_proj.k_scale`."""
    while name.rpartition(".")[2] in _INSIDE:
        name = name.rpartition(".")[0]
    return name
