"""What calibration gains on a real model: `python benchmarks/calibrated_methods.py [--docs docs]`, about ten minutes.

all-MiniLM-L6-v2 is converted by mfptq with every method, at several sizes of calibration text, and judged on other text: by
the relative error of each linear layer's output (36 layers, given the unquantized model's inputs) and of the final sentence
embeddings of the whole quantized model; weights alone, and with activations that are simulated NVFP4 too.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from measuring import replace_marked
from minilm import Grams, MiniLM, divisor, nvfp4_activations, output_error, output_error_w4a4
from safetensors.torch import load_file

import mfptq
from mfptq.calibration.file import (
    CalibrationContents,
    Description,
    InputInfo,
    InputStatistics,
    factor_rank,
    write_calibration,
)
from mfptq.nvfp4 import dequantize

PLAIN, CALIBRATED = ("minmax", "search"), ("weighted", "hessian", "hessian+", "gptq")
TOKENS = (500, 2_000, 20_000)
TEST_TOKENS = 4_000
MARK = "calibrated_methods"


@dataclass
class Result:
    method: str
    tokens: int | None
    weights: float
    outputs: float
    embedding: float
    outputs_w4a4: float
    embedding_w4a4: float


def calibration_file(path: Path, model: MiniLM, grams: dict[str, Grams]) -> Path:
    """Write the calibration file of a pass over so much text."""
    found = {}
    for name, each in grams.items():
        members = model.members(name)
        blocks = len(each.xx) // 16
        every = (each.xx / each.tokens).numpy().reshape(blocks, 16, blocks, 16)
        hessian = every[np.arange(blocks), :, np.arange(blocks)].astype(np.float32)
        moment = np.ascontiguousarray(np.diagonal(hessian, axis1=1, axis2=2)).reshape(-1)
        statistics = InputStatistics(each.amax, each.tokens, moment, hessian, factors(each))
        found[InputInfo(name, len(each.xx), members)] = statistics
    by_name = {info.name: statistics for info, statistics in found.items()}
    about = Description("all-MiniLM-L6-v2", "", "factors", 1, 1, 128, "docstrings")
    write_calibration(path, CalibrationContents(about, tuple(found), lambda info: by_name[info.name], {}))
    return path


def factors(grams: Grams) -> np.ndarray:
    """Return the largest directions of an input; a calibration pass finds nearly the same as it goes."""
    sizes, directions = torch.linalg.eigh(grams.xx / grams.tokens)
    found = (directions * sizes.clamp_min(0).sqrt()).T.flip(0)[: factor_rank(len(sizes))]
    return (found * (1 - 1e-6)).numpy().astype(np.float32)


def converted(model: MiniLM, method: str, calibration: Path, folder: Path) -> tuple[float, dict[str, torch.Tensor]]:
    """Return the relative error of the weights, and the weights `[N, K]`, that a conversion leaves."""
    report = mfptq.convert(
        model.folder, folder / method, method=method, calibration=calibration, ignore=[r"re:pooler\..*"], overwrite=True
    )
    stored = load_file(folder / method / "model.safetensors")
    result = {}
    for name in model.weights():
        codes = stored[f"{name}.weight_scale"].view(torch.uint8).numpy()
        scale = float(stored[f"{name}.weight_global_scale"])
        result[name] = torch.from_numpy(dequantize(stored[f"{name}.weight_packed"].numpy(), codes, scale))
    return report.relative_error, result


@contextmanager
def quantized(model: MiniLM, weights: dict[str, torch.Tensor], divisors: dict[str, float] | None) -> Iterator[None]:
    """Lend the model with other weights and, with `divisors`, inputs rounded to NVFP4."""
    exact = {name: weight.clone() for name, weight in model.weights().items()}
    hooks = []
    for name, weight in weights.items():
        model.model.get_submodule(name).weight.data.copy_(weight)
    for name, _, _ in model.inputs() if divisors else ():
        for member in model.members(name):

            def rounded(_module: torch.nn.Module, args: tuple[torch.Tensor], scale: float = divisors[name]):
                return (nvfp4_activations(args[0], scale),)

            hooks.append(model.model.get_submodule(member).register_forward_pre_hook(rounded))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for name, weight in exact.items():
            model.model.get_submodule(name).weight.data.copy_(weight)


@lru_cache
def exact_embeddings(model: MiniLM) -> torch.Tensor:
    return model.embeddings("test", TEST_TOKENS)


def judge(
    model: MiniLM, weights: dict[str, torch.Tensor], divisors: dict[str, float], grams: dict[str, Grams]
) -> list[float]:
    """Return the errors of outputs and embeddings, weights alone and W4A4."""
    exact = model.weights()
    pairs = [(member, grams[name]) for name, _, _ in model.inputs() for member in model.members(name)]
    alone = np.mean([output_error(exact[member], weights[member], each) for member, each in pairs])
    both = np.mean([output_error_w4a4(exact[member], weights[member], each) for member, each in pairs])
    target = exact_embeddings(model)
    errors = []
    for scales in (None, divisors):
        with quantized(model, weights, scales):
            found = model.embeddings("test", TEST_TOKENS)
        errors.append(float(((found - target).norm(dim=1) / target.norm(dim=1)).mean()))
    return [float(alone), errors[0], float(both), errors[1]]


def study(tokens: tuple[int, ...]) -> list[Result]:
    model, results = MiniLM(), []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for count in tokens:
            train = model.grams("train", count)
            divisors = {name: divisor(each.amax) for name, each in train.items()}
            test = model.grams("test", TEST_TOKENS, divisors)
            path = calibration_file(folder / f"{count}.calibration.safetensors", model, train)
            for method in (*PLAIN, *CALIBRATED):
                error, weights = converted(model, method, path, folder)
                results.append(Result(method, count, error, *judge(model, weights, divisors, test)))
                print(results[-1], flush=True)
    return results


def table(results: list[Result]) -> str:
    head = "| calibration tokens | method | weights | layer outputs | embedding | W4A4 layer outputs | W4A4 embedding |"
    rows = [
        f"| {each.tokens:,} | `{each.method}` | "
        + " | ".join(
            f"{100 * value:.2f} %"
            for value in (each.weights, each.outputs, each.embedding, each.outputs_w4a4, each.embedding_w4a4)
        )
        + " |"
        for each in results
    ]
    return "\n".join([head, "|---|---|---|---|---|---|---|", *rows])


def plot(results: list[Result], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    panels = figure.subplots(1, 2)
    for panel, field, title in zip(
        panels, ("outputs", "embedding"), ("layer outputs", "sentence embeddings"), strict=True
    ):
        for method in (*PLAIN, *CALIBRATED):
            own = [each for each in results if each.method == method]
            panel.plot(
                [each.tokens for each in own],
                [100 * getattr(each, field) for each in own],
                "--" if method in PLAIN else "o-",
                label=method,
            )
        panel.set(xscale="log", xlabel="tokens of calibration text", ylabel="mean relative error, %", title=title)
        panel.grid(alpha=0.3)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--docs", type=Path, help="folder of calibration.md, whose table and plot are replaced")
    parser.add_argument("--tokens", type=int, nargs="*", default=TOKENS)
    arguments = parser.parse_args()
    results = study(tuple(arguments.tokens))
    print(table(results))
    for each in results:
        searched = next(r for r in results if (r.method, r.tokens) == ("search", each.tokens))
        if each.method in CALIBRATED and each.outputs > searched.outputs:
            raise SystemExit(f"{each.method} at {each.tokens} tokens is worse than search")
    if arguments.docs:
        replace_marked(arguments.docs / "calibration.md", MARK, table(results))
        plot(results, arguments.docs / "calibration.png")


if __name__ == "__main__":
    main()
