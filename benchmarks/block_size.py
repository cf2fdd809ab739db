"""How far larger Hessian blocks would carry: `python benchmarks/block_size.py [--docs docs]`, about ten minutes.

A study, not part of the tool. Each weight of all-MiniLM-L6-v2 is quantized column by column; the error of a column is fed
back into the columns after it that lie in the same block of 16, 64, 128, 256 or all K (GPTQ), each group of 16 taking the
scale that `search` finds for it when its turn comes. The shrinkage of the Hessian is chosen for each block size on text of
its own; errors are measured on a third text.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from calibrated_methods import TEST_TOKENS
from measuring import replace_marked
from minilm import Grams, MiniLM, output_error

from mfptq.calibration.methods import importance, local_hessian
from mfptq.kernels import QuantizeArgs, load_kernel
from mfptq.kernels.calibrated import PreparedStatistics
from mfptq.nvfp4 import E4M3_VALUES, dequantize, search_global_scale

BLOCKS: tuple[int | None, ...] = (16, 64, 128, 256, None)
SHRINKAGES = (0.05, 0.2, 0.5)
DAMPING = 0.01  # of the mean diagonal, as GPTQ does
TUNE_TOKENS = 2_000
# Widths K of the inputs of one layer of a dense model of 27 billion parameters, and its number of layers.
LARGE, LARGE_LAYERS = (5120, 6144, 5120, 17408), 64
MARK = "block_size"
Quantizer = Callable[[np.ndarray, float], np.ndarray]


@dataclass
class Row:
    name: str
    tokens: int
    shrinkage: float | None
    error: float
    seconds: float
    floats: Callable[[int], int]  # for an input of K columns


def factors(hessian: torch.Tensor, size: int, shrinkage: float) -> list[torch.Tensor]:
    """Return, for each block, the upper Cholesky factor of the inverse of its damped Hessian, in float32."""
    result = []
    for start in range(0, len(hessian), size):
        block = hessian[start : start + size, start : start + size]
        diagonal = torch.diag(block)
        damped = (1 - shrinkage) * block + torch.diag(shrinkage * diagonal + DAMPING * diagonal.mean())
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
        result.append(torch.linalg.cholesky(inverse, upper=True).float())
    return result


def with_feedback(weight: np.ndarray, scale: float, parts: list[torch.Tensor]) -> np.ndarray:
    """Return the dequantized weight when every block's errors are fed back inside the block."""
    left, result = torch.from_numpy(weight.copy()), torch.empty(weight.shape)
    size, kernel = len(parts[0]), load_kernel()
    packed = np.empty((len(weight), 8), np.uint8)
    codes = np.empty((len(weight), 1), np.uint8)
    for number, factor in enumerate(parts):
        block = left[:, number * size : (number + 1) * size]
        out = result[:, number * size : (number + 1) * size]
        for group in range(0, len(factor), 16):  # the last block may be smaller
            kernel.quantize(
                np.ascontiguousarray(block[:, group : group + 16]), QuantizeArgs("search", scale), packed, codes
            )
            steps = torch.from_numpy((E4M3_VALUES[codes[:, 0]] / scale).astype(np.float32))
            errors = torch.empty(len(weight), 16)
            for i in range(group, group + 16):
                out[:, i] = rounded(block[:, i] / steps) * steps
                errors[:, i - group] = (block[:, i] - out[:, i]) / factor[i, i]
                block[:, i : group + 16] -= errors[:, i - group, None] * factor[i, i : group + 16]
            block[:, group + 16 :] -= errors @ factor[group : group + 16, group + 16 :]
    return result.numpy()


def rounded(values: torch.Tensor) -> torch.Tensor:
    """Return E2M1 values, ties to even."""
    y = values.abs().clamp_max(6)
    grid = torch.where(y < 2, 2.0**22, torch.where(y < 4, 2.0**23, 2.0**24))
    return torch.copysign((y + grid) - grid, values)


def by_kernel(method: str, statistics: PreparedStatistics | None) -> Quantizer:
    def quantize(weight: np.ndarray, scale: float) -> np.ndarray:
        packed = np.empty((len(weight), weight.shape[1] // 2), np.uint8)
        codes = np.empty((len(weight), weight.shape[1] // 16), np.uint8)
        load_kernel().quantize(weight, QuantizeArgs(method, scale, statistics), packed, codes)
        return dequantize(packed, codes, scale)

    return quantize


def measured(model: MiniLM, prepare: Callable[[str], Quantizer], grams: dict[str, Grams]) -> tuple[float, float]:
    """Return the mean relative error of the layers' outputs, and the seconds that quantizing took."""
    errors, seconds = [], 0.0
    weights = {name: weight.numpy().copy() for name, weight in model.weights().items()}
    for name, _, _ in model.inputs():
        members = model.members(name)
        scale = search_global_scale(float(max(np.abs(weights[member]).max() for member in members)))
        begin = time.perf_counter()
        quantize = prepare(name)
        found = [quantize(weights[member], scale) for member in members]
        seconds += time.perf_counter() - begin
        pairs = zip(members, found, strict=True)
        errors += [
            output_error(torch.from_numpy(weights[member]), torch.from_numpy(each), grams[name])
            for member, each in pairs
        ]
    return float(np.mean(errors)), seconds


def local(train: dict[str, Grams], method: str) -> Callable[[str], Quantizer]:
    """Return how mfptq itself quantizes under what a calibration file would hold."""

    def prepare(name: str) -> Quantizer:
        each = train[name]
        count = len(each.xx) // 16
        every = (each.xx / each.tokens).numpy().reshape(count, 16, count, 16)
        hessian = every[np.arange(count), :, np.arange(count)].astype(np.float32)
        if method == "weighted":
            return by_kernel(method, PreparedStatistics(importance(np.diagonal(hessian, axis1=1, axis2=2).reshape(-1))))
        return by_kernel(
            method, None if method == "search" else PreparedStatistics(local_hessian(hessian, each.tokens))
        )

    return prepare


def feedback(train: dict[str, Grams], size: int | None, shrinkage: float) -> Callable[[str], Quantizer]:
    def prepare(name: str) -> Quantizer:
        parts = factors(train[name].xx / train[name].tokens, size or len(train[name].xx), shrinkage)
        return lambda weight, scale: with_feedback(weight, scale, parts)

    return prepare


def study(model: MiniLM, tokens: int, tune: dict[str, Grams], test: dict[str, Grams]) -> list[Row]:
    train, rows = model.grams("train", tokens), []
    held = {"search": lambda _k: 0, "weighted": lambda k: k, "hessian": lambda k: 16 * k, "hessian+": lambda k: 16 * k}
    for method, floats in held.items():
        measured(model, local(train, method), test)  # compiles
        rows.append(Row(f"`{method}`", tokens, None, *measured(model, local(train, method), test), floats))
        print(rows[-1], flush=True)
    for size in BLOCKS:
        choices = {value: measured(model, feedback(train, size, value), tune)[0] for value in SHRINKAGES}
        best = min(choices, key=choices.__getitem__)
        error, seconds = measured(model, feedback(train, size, best), test)
        floats = (lambda k, size=size: k * size) if size else (lambda k: k * k)
        rows.append(Row(f"feedback in {size or 'all K'}", tokens, best, error, seconds, floats))
        print(rows[-1], flush=True)
    return rows


def table(rows: list[Row]) -> str:
    head = (
        "| calibration tokens | method | shrinkage | layer outputs | time, s | statistics, MiniLM | statistics, 27B | "
        "memory for one input of 17,408 |"
    )
    lines = [head, "|---|---|---|---|---|---|---|---|"]
    own = [width for _, _, module in MiniLM().inputs() for width in (module.in_features,)]
    for row in rows:
        mine = sum(map(row.floats, own)) * 4
        large = sum(map(row.floats, LARGE)) * LARGE_LAYERS * 4
        shrunk = "" if row.shrinkage is None else f"{row.shrinkage:g}"
        lines.append(
            f"| {row.tokens:,} | {row.name} | {shrunk} | {100 * row.error:.2f} % | {row.seconds:.1f} | "
            f"{mine / 1e6:.2f} MB | {large / 1e9:.2f} GB | {2 * row.floats(max(LARGE)) * 4 / 1e6:,.1f} MB |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--docs", type=Path, help="folder of calibration.md, whose table is replaced")
    parser.add_argument("--tokens", type=int, nargs="*", default=(2_000, 20_000))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = MiniLM()
    tune, test = model.grams("tune", TUNE_TOKENS), model.grams("test", TEST_TOKENS)
    rows = [row for tokens in arguments.tokens for row in study(model, tokens, tune, test)]
    print(table(rows))
    if arguments.docs:
        replace_marked(arguments.docs / "calibration.md", MARK, table(rows))


if __name__ == "__main__":
    main()
