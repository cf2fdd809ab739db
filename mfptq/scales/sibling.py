"""Another checkpoint's choice of layers, as a rule: what is quantized there is quantized here, what is kept there is kept."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice

from ..errors import ScaleError, quote
from ..names.bridge import bridge_names
from .reading import InputScales

SHOWN = 3


@dataclass(frozen=True, slots=True)
class SiblingLayers:
    """The NVFP4 layers of a checkpoint, as it names them, with their columns K; `scales` is None if it is weight-only."""

    origin: str
    layers: Mapping[str, int]
    scales: InputScales | None

    def chosen(self, modules: Iterable[str]) -> frozenset[str]:
        """Return those of a source's modules that are NVFP4 there; raises ScaleError if it is of another model."""
        known = tuple(modules)
        bridge = bridge_names(self.layers, known)
        foreign = (*bridge.unknown, *bridge.ambiguous)
        if foreign:
            first = ", ".join(quote(name) for name in islice(foreign, SHOWN)) + (
                ", ..." if len(foreign) > SHOWN else ""
            )
            raise ScaleError(
                f"--like {quote(self.origin)}: {len(foreign)} of its NVFP4 layers belong to no weight of the source, or to "
                f"several: {first}; is it of another model?"
            )
        return frozenset(module for module in known if any(True for _ in bridge.names(module)))
