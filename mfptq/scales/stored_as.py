"""Decide, module by module, what `input_scale` means: the tensors beside it first, then what configs say.

Called by `scales.reading`. A config may be a leftover of the checkpoint that this one was made from; a weight in U8 with a
`weight_scale_2` cannot be FP8, whatever is written elsewhere. Configs that disagree where tensors do not tell are an error.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from ..checkpoint.header import TensorInfo
from ..errors import ScaleError, quote
from .values import Algorithms

Said = tuple[str, Algorithms]  # where a config was read, and what it says
_STEMS = (".weight", "")  # a stack of experts is a tensor of its module's own name
_NVFP4, _FP8 = "NVFP4", "FP8"


def agreed_algorithms(said: Sequence[Said], tensors: Mapping[str, TensorInfo], modules: Iterable[str]) -> Algorithms:
    """Return what each module's activations were quantized for, of `modules` that have an input scale.

    Raises ScaleError naming two configs that say different things of one module.
    """
    return Algorithms(layers=dict(_decided(said, tensors, modules)))


def _decided(
    said: Sequence[Said], tensors: Mapping[str, TensorInfo], modules: Iterable[str]
) -> Iterator[tuple[str, str]]:
    for module in modules:
        stored = _stored(tensors, module)
        found = {
            place: algorithm for place, each in said if (algorithm := each.of(module)) and _fits(algorithm, stored)
        }
        places = {algorithm.upper(): place for place, algorithm in found.items()}
        if len(places) > 1:
            (one, first), (other, second) = list(places.items())[:2]
            raise ScaleError(
                f"{quote(module)}: {first} says {quote(one)}, {second} says {quote(other)}: remove the one that is wrong"
            )
        if found or stored:
            yield module, next(iter(found.values()), stored)


def _stored(tensors: Mapping[str, TensorInfo], module: str) -> str:
    """Return what a module's weight is stored as; "" where it is neither NVFP4 nor FP8, or not there."""
    for stem in _STEMS:
        weight = tensors.get(module + stem)
        if weight is not None and weight.dtype == "F8_E4M3":
            return _FP8
        if weight is not None and weight.dtype == "U8":
            second = f"{module}{stem}_scale_2" if stem else f"{module}_weight_scale_2"
            return _NVFP4 if second in tensors else ""
    return ""


def _fits(algorithm: str, stored: str) -> bool:
    """Return whether weights stored so can be of an algorithm: W4A8_NVFP4_FP8 has weights like NVFP4's."""
    name = algorithm.upper()
    return not stored or (_NVFP4 in name if stored == _NVFP4 else _FP8 in name and _NVFP4 not in name)
