"""Small checkpoints of quantized weights, and what each must decode to, computed apart from the package with torch."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from mfptq.checkpoint.encoding import CodeScaler, Region
from mfptq.checkpoint.folder import Checkpoint, Origin, read_checkpoint
from mfptq.encodings.codes import scale_codes
from mfptq.encodings.contents import Contents, read_contents
from mfptq.kernels.decode import load_decoder

Tensors = dict[str, torch.Tensor]
FP8 = torch.float8_e4m3fn
E8M0 = torch.float8_e8m0fnu
DECODERS: list[CodeScaler] = [scale_codes, load_decoder()]


def write(folder: Path, *shards: Tensors, config: dict[str, Any] | None = None) -> Path:
    """Write a checkpoint of some shards."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config or {}))
    if len(shards) == 1:
        save_file(shards[0], folder / "model.safetensors", {"format": "pt"})
        return folder
    places = {}
    for number, tensors in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file(tensors, folder / name, {"format": "pt"})
        places |= dict.fromkeys(tensors, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


def opened(folder: Path) -> tuple[Checkpoint, Contents]:
    checkpoint = read_checkpoint(Origin(folder))
    return checkpoint, read_contents(checkpoint)


def decoded(folder: Path, scaler: CodeScaler = scale_codes) -> Tensors:
    """Return every encoded weight of a checkpoint, whole, as the package decodes it."""
    checkpoint, contents = opened(folder)
    found = {}
    for tensor in contents:
        if tensor.encoding is not None:
            matrix = tensor.matrix
            out = np.empty(matrix.size, np.uint16)
            tensor.encoding.decode(checkpoint.source, Region(0, matrix.rows, 0, matrix.columns), out, scaler)
            found[tensor.info.name] = torch.from_numpy(out).view(torch.bfloat16).reshape(tensor.info.shape)
    checkpoint.source.close()
    return found


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two bfloat16 tensors have the same bits."""
    return one.dtype == other.dtype == torch.bfloat16 and torch.equal(one.view(torch.int16), other.view(torch.int16))


def weight(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, columns, generator=generator) * 0.05).to(torch.bfloat16)


def spread(scales: torch.Tensor, block: tuple[int, int], shape: tuple[int, int]) -> torch.Tensor:
    """Return each block's scale at each of its values."""
    return scales.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[: shape[0], : shape[1]]


def fp8_block(source: torch.Tensor, block: tuple[int, int] = (128, 128), dtype: Any = torch.float32) -> Tensors:
    """Return E4M3 codes and the scales of blocks; scales of one byte are powers of two."""
    rows, columns = source.shape
    padded = torch.zeros(math.ceil(rows / block[0]) * block[0], math.ceil(columns / block[1]) * block[1])
    padded[:rows, :columns] = source.float()
    tiles = padded.reshape(padded.shape[0] // block[0], block[0], -1, block[1])
    scales = (tiles.abs().amax((1, 3)) / 448).clamp_min(1e-12)
    if dtype in (E8M0, torch.uint8):
        exponents = torch.ceil(torch.log2(scales))
        scales = torch.exp2(exponents)
        stored = (exponents + 127).to(torch.uint8)
        stored = stored.view(E8M0) if dtype == E8M0 else stored
    else:
        stored = scales.to(dtype)
        scales = stored.float()
    codes = (source.float() / spread(scales, block, (rows, columns))).clamp(-448, 448).to(FP8)
    return {"weight": codes, "scale": stored}


def deepseek(codes: torch.Tensor, scales: torch.Tensor, block: tuple[int, int] = (128, 128)) -> torch.Tensor:
    """Return what DeepSeek's own cast makes of a weight: a float32 product, rounded to bfloat16."""
    numbers = torch.exp2(scales.float() - 127) if scales.dtype == torch.uint8 else scales.float()
    return (codes.float() * spread(numbers, block, tuple(codes.shape))).to(torch.bfloat16)


def mxfp4(source: torch.Tensor) -> Tensors:
    """Return packed E2M1 codes and E8M0 exponents of a weight, one for 32 columns."""
    blocks = source.float().reshape(source.shape[0], -1, 32)
    exponents = torch.floor(torch.log2(blocks.abs().amax(-1).clamp_min(1e-30))) - 2
    values = (blocks / torch.exp2(exponents)[..., None]).reshape(source.shape)
    grid = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    nibbles = (values.abs().clamp_max(6)[..., None] - grid).abs().argmin(-1).to(torch.uint8)
    nibbles |= (values < 0).to(torch.uint8) << 3
    return {"packed": nibbles[:, 0::2] | nibbles[:, 1::2] << 4, "scale": (exponents + 127).to(torch.uint8)}


def mxfp4_values(packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return the values of packed E2M1 codes and E8M0 exponents."""
    grid = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    nibbles = torch.stack([packed & 15, packed >> 4], -1).reshape(packed.shape[0], -1)
    factors = torch.exp2(scale.float() - 127).repeat_interleave(32, 1)
    return (grid[nibbles.long()] * factors).to(torch.bfloat16)


def int4(source: torch.Tensor, group: int = 32) -> Tensors:
    """Return codes packed into int32 and bfloat16 scales, as compressed-tensors stores them."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    blocks = source.float().reshape(source.shape[0], -1, group)
    scales = (blocks.abs().amax(-1) / 7.5).to(torch.bfloat16)
    codes = torch.round(blocks / scales.float().clamp_min(1e-9)[..., None]).clamp(-8, 7).to(torch.int8)
    packed = pack_to_int32(codes.reshape(source.shape), 4)
    return {
        "packed": packed,
        "scale": scales,
        "shape": torch.tensor(source.shape),
        "codes": codes.reshape(source.shape),
    }
