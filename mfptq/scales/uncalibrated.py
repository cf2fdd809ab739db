"""Bound input scales without a calibration pass, where the structure gives a bound for certain; a safe constant elsewhere.

Called by `planner` and `planning.weight_targets` for `input_scales="auto"`. Reads the weights of norms, nothing else.

Too large a scale clips, which ruins a layer; a small one costs nothing as long as block scales stay normal E4M3 numbers, which
have 14 octaves. So every scale here is a power of two on the low side.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from ..checkpoint.folder import Checkpoint
from ..checkpoint.stored_bytes import read_float32
from ..checkpoint.weights import StoredTensor
from ..dtypes import NUMPY_DTYPES
from ..names.fusion import FusedGroup
from ..names.norms import BEFORE_ATTENTION, Norms, known_norms
from ..nvfp4 import INPUT_SCALE_NUMERATOR
from .input_scales import AUTO, InputScales

CONSTANT = 4.0  # inputs up to 672; on Gemma 3 270M, 4 to 16 for all layers are as good as calibrated scales
LOWEST = 2.0  # below, blocks of ordinary size would meet subnormal scales; 1 is a mark of no calibration besides
HIGHEST = 1024.0

_ATTENTION = re.compile(r"(.*\blayers\.\d+)\.(self_attn\.[qkv]_proj|linear_attn\.in_proj_(qkv|z|qkvz|a|b|ba))")
_MLP = re.compile(
    r"(.*\blayers\.\d+)\.(mlp\.((experts\.\d+|shared_expert)\.)?(gate|up)_proj|block_sparse_moe\.experts\.\d+\.w[13])"
)


@dataclass(frozen=True, slots=True)
class UncalibratedInputs:
    """Stands for input scales until it is known which layers need one."""

    checkpoint: Checkpoint

    def of(self, groups: Iterable[FusedGroup]) -> InputScales:
        """Return a scale for every module of the groups; the reading order is that of the groups."""
        norms = known_norms(self.checkpoint.config)
        stored = {tensor.info.name: tensor for tensor in self.checkpoint.tensors()}
        bounds: dict[str, float | None] = {}
        found: dict[str, float] = {}
        bounded, wanted = 0, tuple(groups)
        for group in wanted:
            norm = _norm_of(group, norms)
            if norm not in bounds:
                bounds[norm] = self._bound(stored.get(f"{norm}.weight"), norms.offset if norms is not None else 0.0)
            bound = bounds[norm]
            bounded += bound is not None
            found.update(dict.fromkeys(group.members, CONSTANT if bound is None else _scale(bound)))
        about = (
            f"uncalibrated: {bounded} of {len(wanted)} inputs bounded by the norm before them, "
            f"{CONSTANT:g} for the others"
        )
        return InputScales(found, AUTO, about)

    def _bound(self, norm: StoredTensor | None, offset: float) -> float | None:
        """Return the largest magnitude that a norm can give: |gamma| times the root of its width; None if unknown."""
        if norm is None or norm.info.dtype not in NUMPY_DTYPES or len(norm.info.shape) != 1:
            return None
        gamma = np.abs(read_float32(self.checkpoint.source, norm) + np.float32(offset))
        bound = float(gamma.max(initial=0.0)) * math.sqrt(norm.info.shape[0])
        return bound if math.isfinite(bound) else None


InputScaleSource = InputScales | UncalibratedInputs


def _norm_of(group: FusedGroup, known: Norms | None) -> str:
    """Return the norm whose output all members of a group read; "" where structure does not say so."""
    if known is None:
        return ""
    norms = set()
    for member in group.members:
        if match := _ATTENTION.fullmatch(member):
            norms.add(f"{match[1]}.{BEFORE_ATTENTION}")
        elif match := _MLP.fullmatch(member):
            norms.add(f"{match[1]}.{known.before_mlp}")
        else:
            norms.add("")
    return norms.pop() if len(norms) == 1 else ""


def _scale(bound: float) -> float:
    """Return the largest power of two that clips nothing up to a bound, within LOWEST and HIGHEST."""
    if bound <= INPUT_SCALE_NUMERATOR / HIGHEST:
        return HIGHEST
    return max(LOWEST, 2.0 ** math.floor(math.log2(INPUT_SCALE_NUMERATOR / bound)))
