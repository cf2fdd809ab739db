"""What an existing NVFP4 checkpoint tells: its choice of layers and their input scales, whichever tool wrote it.

llm-compressor, AutoRound and mfptq write `<module>.weight_packed` U8 `[N, K/2]`, ModelOpt `<module>.weight` U8, or for a
stack of experts `<stack>` U8 `[E, N, K/2]` with `<stack>_weight_scale`; the block scales are E4M3 in all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from ..checkpoint.folder import Origin, read_checkpoint
from ..checkpoint.header import TensorInfo
from ..checkpoint.weights import WEIGHT_SUFFIX
from ..errors import ScaleError, SourceError, quote
from ..names.bridge import split_name
from ..nvfp4 import INPUT_SCALE_NUMERATOR
from ..scales.reading import InputScales, read_input_scales
from ..scales.sibling import SiblingLayers
from ..scales.values import ScaleConvention
from .file import Contents, Description, InputInfo, InputStatistics, write_calibration

PACKED_SUFFIX = ".weight_packed"


def read_sibling(path: str | Path, kind: str | None = None) -> SiblingLayers:
    """Return the NVFP4 layers of a checkpoint folder and their input scales; reads headers and scales only.

    `kind` says what its scales are where neither names nor config tell. Raises ScaleError for a folder that is no NVFP4
    checkpoint.
    """
    try:
        checkpoint = read_checkpoint(Origin(Path(path)))
        try:
            tensors = {tensor.info.name: tensor.info for tensor in checkpoint.tensors()}
        finally:
            checkpoint.source.close()
    except SourceError as error:
        raise ScaleError(f"checkpoint {quote(path)}: {error}") from None
    layers = dict(_layers(tensors))
    if not layers:
        raise ScaleError(f"checkpoint {quote(path)} has no NVFP4 layers: weights in U8 with scales in F8_E4M3")
    scaled = any(split_name(name)[1] and split_name(name)[0] in layers for name in tensors)
    return SiblingLayers(str(path), layers, _scales(path, kind, layers) if scaled else None)


def _layers(tensors: Mapping[str, TensorInfo]) -> Iterable[tuple[str, int]]:
    for name, info in tensors.items():
        if info.dtype != "U8" or len(info.shape) < 2:
            continue
        for suffix, joined in (
            (PACKED_SUFFIX, ".weight_scale"),
            (WEIGHT_SUFFIX, ".weight_scale"),
            ("", "_weight_scale"),
        ):
            module = name.removesuffix(suffix)
            scale = tensors.get(module + joined)
            if name.endswith(suffix) and scale is not None and scale.dtype == "F8_E4M3":
                yield module, 2 * info.shape[-1]
                break


def _scales(path: str | Path, kind: str | None, layers: Mapping[str, int]) -> InputScales:
    found = read_input_scales(path, kind)
    return InputScales({name: value for name, value in found.divisors.items() if name in layers}, found.origin)


def _amax(divisor: float) -> float:
    """Return the float32 range that gives this divisor again, or the one nearest to it where none does."""
    nearest = np.float32(INPUT_SCALE_NUMERATOR / divisor)
    around = (nearest, np.nextafter(nearest, np.float32(0)), np.nextafter(nearest, np.float32(np.inf)))
    exact = (float(each) for each in around if ScaleConvention("amax").divisor("", None, float(each)) == divisor)
    return next(exact, float(nearest))


def extract_scales(path: str | Path, output: str | Path, kind: str | None = None) -> Description:
    """Write the input ranges of an NVFP4 checkpoint as a calibration file with statistics `amax`.

    A layer whose scale is a mark of no calibration (0, NaN, infinity or 1) is left out. Raises ScaleError for a
    checkpoint without input scales.
    """
    like = read_sibling(path, kind)
    if like.scales is None:
        raise ScaleError(f"checkpoint {quote(path)} has no input scales: it is weight-only")
    amax = {name: _amax(value) for name, value in like.scales.divisors.items() if like.scales.is_usable(name)}
    if not amax:
        raise ScaleError(f"checkpoint {quote(path)}: every input scale is a mark of no calibration")
    inputs = tuple(InputInfo(name, like.layers[name], (name,)) for name in amax)
    description = Description(Path(path).name, "", "amax", origin="extract")
    contents = Contents(description, inputs, lambda info: InputStatistics(amax[info.name]), {})
    write_calibration(Path(output), contents)
    return description
