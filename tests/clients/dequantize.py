"""A second opinion on NVFP4 and FP8: reads safetensors and dequantizes with numpy alone, sharing no code with mfptq."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from tests.models import Tensors, write_shards

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
E2M1_PAIRS = np.stack([np.tile(E2M1, 16), np.repeat(E2M1, 16)], axis=-1)  # of a byte's low half, then of its high half
EXPERT = re.compile(r"(?P<stack>.*\.experts)\.(?P<number>\d+)\.(?P<leaf>gate_proj|up_proj|down_proj)\.weight")
NUMPY = {"BF16": "<u2", "F16": "<f2", "F32": "<f4", "F8_E4M3": "u1", "U8": "u1", "I64": "<i8", "I32": "<i4", "BOOL": "?"}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor as a file holds it; BF16 and F8_E4M3 are their codes."""

    dtype: str
    values: np.ndarray


def read_tensors(folder: Path) -> dict[str, Stored]:
    """Return every tensor of a checkpoint, by name."""
    found: dict[str, Stored] = {}
    for path in sorted(folder.glob("*.safetensors")):
        data = path.read_bytes()
        begin = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:begin])
        assert header.pop("__metadata__") == {"format": "pt"}
        for name, info in header.items():
            first, last = (begin + offset for offset in info["data_offsets"])
            values = np.frombuffer(data[first:last], NUMPY[info["dtype"]]).reshape(info["shape"])
            assert name not in found, f"{name} is stored twice"
            found[name] = Stored(info["dtype"], values)
    return found


def e4m3_values() -> np.ndarray:
    """Return the value of each E4M3 code without a sign: 4 bits of exponent with bias 7, 3 of mantissa, 127 is NaN."""
    exponent, mantissa = np.divmod(np.arange(128), 8)
    values = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10.0))
    values[127] = np.nan
    return values.astype(np.float32)


def to_bf16(values: np.ndarray) -> np.ndarray:
    """Return the BF16 codes of float32 values, rounded to nearest with ties to even."""
    bits = values.astype(np.float32, copy=False).view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def to_float32(stored: Stored) -> np.ndarray:
    """Return the values of a BF16, F16 or F32 tensor."""
    if stored.dtype == "BF16":
        return (stored.values.astype(np.uint32) << 16).view(np.float32)
    return stored.values.astype(np.float32)


def dequantized(packed: np.ndarray, scale: np.ndarray, global_scale: np.ndarray) -> np.ndarray:
    """Return the float32 weight `[N, K]` of `[N, K/2]` packed values, `[N, K/16]` scale codes and a `[1]` divisor."""
    values = E2M1_PAIRS[packed].reshape(len(packed), -1, 16)
    scales = e4m3_values()[scale] / global_scale.astype(np.float32)
    return (values * scales[:, :, None]).reshape(len(packed), -1)


def dequantized_fp8(codes: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Return the float32 weight `[N, K]` of E4M3 codes and scales: one, one for each row, or one for each 128x128 block."""
    values = np.concatenate([e4m3_values(), -e4m3_values()])[codes]
    if (scale.ndim == 2 and scale.shape[1] > 1) or (scale.ndim == 2 and scale.shape[0] not in (1, len(codes))):
        scale = scale.repeat(128, axis=0)[: codes.shape[0]].repeat(128, axis=1)[:, : codes.shape[1]]
    return values * scale


def dequantize_weights(stored: dict[str, Stored]) -> dict[str, np.ndarray]:
    """Return each quantized weight under its original name, as float32."""
    return dequantize_fp8_weights(stored) | dequantize_nvfp4_weights(stored)


def dequantize_fp8_weights(stored: dict[str, Stored]) -> dict[str, np.ndarray]:
    """Return each FP8 weight under its original name, as float32."""
    names = [name for name, each in stored.items() if name.endswith(".weight") and each.dtype == "F8_E4M3"]
    return {name: dequantized_fp8(stored[name].values, to_float32(stored[f"{name}_scale"])) for name in names}


def dequantize_nvfp4_weights(stored: dict[str, Stored]) -> dict[str, np.ndarray]:
    """Return each NVFP4 weight under its original name, as float32."""
    modules = [name.removesuffix("_packed") for name in stored if name.endswith(".weight_packed")]
    parts = ("packed", "scale", "global_scale")
    return {name: dequantized(*(stored[f"{name}_{part}"].values for part in parts)) for name in modules}


def stack_experts(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the weights with the experts of each layer put back into `gate_up_proj` and `down_proj`, gate first."""
    experts: dict[str, dict[int, dict[str, np.ndarray]]] = {}
    result = {}
    for name, weight in weights.items():
        match = EXPERT.fullmatch(name)
        if match:
            experts.setdefault(match["stack"], {}).setdefault(int(match["number"]), {})[match["leaf"]] = weight
        else:
            result[name] = weight
    for stack, found in experts.items():
        rows = [found[number] for number in range(len(found))]
        result[f"{stack}.gate_up_proj"] = np.stack([np.concatenate([row["gate_proj"], row["up_proj"]]) for row in rows])
        result[f"{stack}.down_proj"] = np.stack([row["down_proj"] for row in rows])
    return result


def dequantize_checkpoint(folder: Path, *, stacked: bool = True) -> Tensors:
    """Return the checkpoint that computes what a quantized one means, under the original names, in BF16.

    `stacked`: the experts of a layer lie in one tensor, as the source has them.
    """
    stored = read_tensors(folder)
    weights = dequantize_weights(stored)
    weights = stack_experts(weights) if stacked else weights
    result = {name: torch.from_numpy(to_bf16(weight).copy()).view(torch.bfloat16) for name, weight in weights.items()}
    fp8 = dequantize_fp8_weights(stored)
    for name, tensor in stored.items():
        if name not in fp8 and not re.search(
            r"\.(weight_packed|weight_scale|weight_global_scale|input_global_scale|input_scale)$", name
        ):
            values = torch.from_numpy(tensor.values.copy())
            result[name] = values.view(torch.bfloat16) if tensor.dtype == "BF16" else values
    return result


def write_twin(quantized: Path, source: Path, folder: Path, *, stacked: bool = True) -> Path:
    """Write the BF16 twin of a quantized checkpoint as one file, with the source's configuration; return its folder."""
    ignored = shutil.ignore_patterns("*.safetensors", "*.index.json")
    shutil.copytree(source, folder, ignore=ignored)
    tensors = dequantize_checkpoint(quantized, stacked=stacked)
    write_shards(folder, tensors, [list(tensors)])
    return folder


def relative_error(source: Path, quantized: Path) -> float:
    """Return the Frobenius norm of the error over that of the weights, all quantized weights together."""
    wanted, found = read_tensors(source), stack_experts(dequantize_weights(read_tensors(quantized)))
    pairs = [(to_float32(wanted[name]).astype(np.float64), weight) for name, weight in found.items()]
    error = sum(np.square(weight - original).sum() for original, weight in pairs)
    return float(np.sqrt(error / sum(np.square(original).sum() for original, _ in pairs)))
