"""Count how much of a model is quantized: shown first of every plan, since most of a model may be kept without an error.

Called by `plan`; the command line shows it. Reads names and shapes only.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

from ..checkpoint.weights import name_pattern
from ..errors import quote
from ..names.engine import built_modules
from ..names.leaves import kept_by
from ..names.wrappers import logical
from .formats import FORMATS
from .rules import Selection

ENOUGH = 0.5
_LABELS = {"nvfp4": "FP4", "fp8": "FP8"}  # of formats, by family


@dataclass(frozen=True, slots=True)
class Share:
    """Numbers of weights: quantized ones, those in the decoder's blocks, all; `kept` says why most of these stay.

    `decoder` counts matrices only, without embedding tables and norms; `inside` those of them that are quantized; `into` says
    in which formats.
    """

    quantized: int
    inside: int
    decoder: int
    total: int
    kept: str
    into: str

    def __str__(self) -> str:
        part = f"{self.quantized / max(1, self.total):.1%} of the model's weights become {self.into}"
        return f"{part}, {self.inside / self.decoder:.1%} of those in the decoder's blocks" if self.decoder else part

    @property
    def warning(self) -> str:
        """A line for people if the decoder stays as it is for the most part, else ""."""
        if not self.decoder or self.inside >= ENOUGH * self.decoder:
            return ""
        return f"only {self.inside / self.decoder:.1%} of the decoder's weights become {self.into}; most of the rest: {self.kept}"


def share_of(selection: Selection) -> Share:
    """Return how much of a model is quantized."""
    quantized = inside = decoder = total = 0
    kept: Counter[str] = Counter()
    for item in selection.tensors:
        info, module, decision = item.candidate.tensor.info, item.candidate.module, item.decision
        size = math.prod(info.shape)
        total += size
        quantized += size * decision.quantize
        built = next(built_modules(info.name, info.shape), "")
        if built and not selection.structure.outside(module) and _is_layer(name_pattern(logical(module), "0")):
            decoder += size
            inside += size * decision.quantize
            if not decision.quantize:
                kept[f"{quote(name_pattern(module))} ({decision.reason})"] += size
    why = kept.most_common(1)[0][0] if kept else ""
    families = {FORMATS[item.decision.format].family for item in selection.tensors if item.decision.quantize}
    into = " or ".join(label for family, label in _LABELS.items() if family in families)
    return Share(quantized, inside, decoder, total, why, into)


@lru_cache(maxsize=4096)
def _is_layer(pattern: str) -> bool:
    """Return whether a name, with every number replaced, may be that of a linear layer of a block."""
    return {line.role for line in kept_by(pattern)}.isdisjoint({"table", "norm", "head", "state", "tower", "drafter"})
