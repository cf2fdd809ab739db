"""Tell how much of a model is quantized: said first of every plan, since most of a model may be kept without a fault.

Made from a selection, read by the plan and what shows it.
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
    kept: str = ""
    into: str = "FP4"

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
        info = item.candidate.tensor.info
        size = math.prod(info.shape)
        total += size
        quantized += size * item.decision.quantize
        built = next(built_modules(info.name, info.shape), "")
        if built and not selection.structure.outside(item.candidate.module) and _is_layer(info.name):
            decoder += size
            inside += size * item.decision.quantize
            kept[f"{quote(name_pattern(item.candidate.module))} ({item.decision.reason})"] += size * (
                not item.decision.quantize
            )
    return Share(quantized, inside, decoder, total, kept.most_common(1)[0][0] if kept else "", formats_label(selection))


def formats_label(selection: Selection) -> str:
    """Return what quantized weights become, in a word or two: FP4, FP8, or both."""
    found = {FORMATS[item.decision.format].family for item in selection.tensors if item.decision.quantize}
    return " or ".join(word for family, word in (("nvfp4", "FP4"), ("fp8", "FP8")) if family in found) or "FP4"


def _is_layer(name: str) -> bool:
    return _is_layer_kind(name_pattern(logical(name.removesuffix(".weight")), "0"))


@lru_cache(maxsize=4096)
def _is_layer_kind(kind: str) -> bool:
    roles = {line.role for line in kept_by(kind)}
    return roles.isdisjoint({"table", "norm", "head", "state", "tower", "drafter"})
