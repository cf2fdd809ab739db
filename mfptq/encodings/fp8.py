"""FP8 weights (E4M3) with a scale for each tensor, row, block or 32 columns.

Written so by DeepSeek and those who follow it (`weight_scale_inv`, which multiplies despite its name), compressed-tensors and
ModelOpt (`weight_scale`), DeepSeek-V4 (`scale`) and Mistral (`qscale_weight`). Scales are float32, bfloat16, float16, or one
byte each, which is an exponent (E8M0) whatever the dtype is called. Called by `contents` to recognize them.
"""

from __future__ import annotations

from collections.abc import Iterable

from ..checkpoint.header import TensorInfo
from ..checkpoint.weights import STACKED_DOWN, STACKED_GATE_UP, StoredTensor
from ..errors import SourceError, quote
from ..names.engine import WEIGHT_SUFFIX
from .codes import E4M3
from .declared import Block, Declared
from .modules import ONE_BYTE_SCALES, Module, Recognized, blocks_shape, check_dtype, recognized
from .scaled import ScaledCodes

FP8 = "F8_E4M3"
WEIGHT = WEIGHT_SUFFIX.removeprefix(".")
SCALES = ("weight_scale_inv", "weight_scale", "scale", "qscale_weight")
_STACK_SCALES = ("scale_inv", "weight_scale_inv", "weight_scale", "scale")
_DEFAULT_BLOCK = (128, 128)
_MX_COLUMNS = 32


def fp8(module: Module) -> Iterable[Recognized]:
    """Yield the FP8 weights of a module that have their scales: its `weight`, or stacks of experts."""
    weight = module.get(WEIGHT, FP8)
    if weight is not None and len(weight.info.shape) == 2:
        yield from _of(module, weight, SCALES, f"{module.name}.{WEIGHT}")
    for leaf in (STACKED_GATE_UP, STACKED_DOWN):
        stack = module.get(leaf, FP8)
        if stack is not None and len(stack.info.shape) == 3:
            yield from _of(module, stack, [f"{leaf}_{scale}" for scale in _STACK_SCALES], stack.info.name)


def _of(module: Module, weight: StoredTensor, names: Iterable[str], name: str) -> Iterable[Recognized]:
    scales = module.one_of(names)
    if scales is None:
        return
    check_dtype(scales.info)
    shape = weight.info.shape
    block, words = _granularity(shape, scales.info, module.declared)
    mx = " (MXFP8)" if block == (1, _MX_COLUMNS) else ""
    dtype = "E8M0" if scales.info.dtype in ONE_BYTE_SCALES else scales.info.dtype
    label = f"FP8 E4M3{mx}, {dtype} scale per {words}"
    encoding = ScaledCodes(label, E4M3, weight, scales, shape[-2], shape[-1], *block)
    found = recognized(module, weight, shape, encoding, scales, module.get("weight_zero_point"))
    yield found._replace(name=name)


def _granularity(shape: tuple[int, ...], scales: TensorInfo, declared: Declared) -> tuple[Block, str]:
    """Return how many rows and columns of a weight share a scale, and what one calls that.

    Blocks are those that the config declares, 128x128 where it declares none; never what shapes alone would suggest: of
    576 rows and 5 scales, 128 is right and 116 is wrong. Raises SourceError where nothing fits exactly.
    """
    *stack, rows, columns = shape
    one_byte = scales.dtype in ONE_BYTE_SCALES
    found = scales.shape
    blocks = [block for block in declared.blocks if found == blocks_shape(shape, block)]
    if len({_cut(shape, block) for block in blocks}) > 1:
        sizes = " and ".join(f"{bn}x{bk}" for bn, bk in blocks)
        raise SourceError(f"scale {quote(scales.name)} fits blocks of {sizes}, which the config both declares")
    if blocks:
        return blocks[0], f"{blocks[0][0]}x{blocks[0][1]}"
    if found in ((*stack,), (*stack, 1), (*stack, 1, 1)) or (not stack and found == ()):
        return (rows, columns), "tensor"
    if found in ((*stack, rows), (*stack, rows, 1)):
        return (1, columns), "row"
    if one_byte and found == blocks_shape(shape, (1, _MX_COLUMNS)):
        return (1, _MX_COLUMNS), f"{_MX_COLUMNS} columns"
    expected = blocks_shape(shape, _DEFAULT_BLOCK)
    if not stack and found == (expected[0], 1, expected[1], 1):
        return _DEFAULT_BLOCK, "128x128"
    if not declared.blocks and found == expected:
        return _DEFAULT_BLOCK, "128x128"
    wanted = declared.blocks or (_DEFAULT_BLOCK,)
    sizes = " or ".join(f"{list(blocks_shape(shape, block))} for blocks of {block[0]}x{block[1]}" for block in wanted)
    raise SourceError(
        f"scale {quote(scales.name)} is {scales.dtype} {list(found)} for a weight {list(shape)}, expected {sizes}, "
        f"one number, or one for each row"
    )


def _cut(shape: tuple[int, ...], block: Block) -> Block:
    """Return a block no larger than the weight: blocks that differ only beyond its edge are the same."""
    return min(block[0], shape[-2]), min(block[1], shape[-1])
