"""Weights per second of the kernels alone, from memory to memory: `python benchmarks/kernels.py [--device cuda]`.

On a CPU: one core, one tile [256, 4096]. On a GPU: the kernel by itself, on data that is on the device already, and with
the copies from and to host memory, in tiles of 4 MiB on several threads.
"""

from __future__ import annotations

import argparse
import threading
import time
from collections.abc import Callable

import numpy as np

from mfptq.calibration.methods import importance, local_hessian
from mfptq.kernels import Recipe, load_kernel
from mfptq.kernels.calibrated import CALIBRATED_METHODS, Statistics, load_calibrated_kernel

SHAPE = (256, 4096)
RECIPES = (Recipe("search", 2.0**13), Recipe("minmax", 2688 / 0.1))


def tile(dtype: str, shape: tuple[int, int] = SHAPE) -> np.ndarray:
    values = np.random.default_rng(0).standard_normal(shape).astype(np.float32) * 0.02
    return (values.view(np.uint32) >> 16).astype(np.uint16) if dtype == "bf16" else values.astype(dtype)


def best(run: Callable[[], object], repeat: int = 30) -> float:
    run()
    times = []
    for _ in range(repeat):
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return min(times)


def cpu() -> None:
    kernel = load_kernel("cpu")
    packed, scales = np.empty((256, 2048), np.uint8), np.empty((256, 256), np.uint8)
    print(f"kernel {kernel.name}, million weights per second, one core, best of 30")
    for dtype in ("bf16", "float16", "float32"):
        data = tile(dtype)
        rates = [best(lambda recipe=recipe: kernel.quantize(data, recipe, packed, scales)) for recipe in RECIPES]
        rates.append(best(lambda: kernel.amax(data)))
        search, minmax, amax = (data.size / seconds / 1e6 for seconds in rates)
        print(f"{dtype:8} search {search:6.0f}  minmax {minmax:6.0f}  amax {amax:6.0f}")
        calibrated(data)


def calibrated(data: np.ndarray) -> None:
    """Print the rates of the methods that take statistics, with correlated inputs of very different sizes."""
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((256, data.shape[1])) * rng.lognormal(0, 1, data.shape[1])
    inputs[:, 1:] += 0.5 * inputs[:, :-1]
    blocks = inputs.reshape(len(inputs), -1, 16).transpose(1, 0, 2)
    hessian = (blocks.transpose(0, 2, 1) @ blocks / len(inputs)).astype(np.float32)
    moment = np.diagonal(hessian, axis1=1, axis2=2).reshape(-1)
    kernel, out = load_calibrated_kernel("cpu"), (np.empty((256, 2048), np.uint8), np.empty((256, 256), np.uint8))
    for method in CALIBRATED_METHODS:
        found = Statistics(importance(moment) if method == "weighted" else local_hessian(hessian, 10_000))
        recipe = Recipe(method, 2.0**13)
        seconds = best(
            lambda found=found, recipe=recipe: kernel.quantize(data, recipe, found, packed=out[0], scales=out[1])
        )
        print(f"{'':8} {method} {data.size / seconds / 1e6:.0f}")


def gpu(device: str) -> None:
    import torch

    from mfptq.kernels import triton as code
    from mfptq.kernels.cuda import LANES

    kernel = load_kernel(device)
    data = torch.from_numpy(np.tile(tile("bf16", (1024, 4096)), (16, 1)).view(np.int16)).to(device)
    blocks = data.numel() // 16
    packed = torch.empty(blocks * 2, dtype=torch.int32, device=device)
    scales = torch.empty(blocks, dtype=torch.uint8, device=device)
    stats = torch.empty(7 * -(-blocks // LANES), dtype=torch.float64, device=device)
    print(f"kernel {kernel.name}, billion weights per second, {torch.cuda.get_device_name(device)}")
    for recipe, function in zip(RECIPES, (code.search, code.minmax), strict=True):

        def run() -> None:
            function[(-(-blocks // LANES),)](
                data.view(torch.int32), packed, scales, stats, blocks, recipe.global_scale, kind=0, lanes=LANES,
                num_warps=8, enable_fp_fusion=False,
            )  # fmt: skip
            torch.cuda.synchronize()

        print(f"{recipe.method}: on the device {data.numel() / best(run) / 1e9:.1f}", end="")
        for threads in (1, 4, 8):
            print(f", from host memory with {threads} threads {streamed(kernel, recipe, threads):.1f}", end="")
        print()


def streamed(kernel, recipe: Recipe, threads: int, tiles: int = 200) -> float:
    def work() -> None:
        data = kernel.allocate(4 * 2**20).view(np.uint16).reshape(512, 4096)
        data[:] = tile("bf16", (512, 4096))
        packed = kernel.allocate(2**20).reshape(512, 2048)
        scales = kernel.allocate(2**17).reshape(512, 256)
        kernel.quantize(data, recipe, packed, scales)
        ready.wait()
        for _ in range(tiles // threads):
            kernel.quantize(data, recipe, packed, scales)

    ready = threading.Barrier(threads + 1)
    pool = [threading.Thread(target=work) for _ in range(threads)]
    for thread in pool:
        thread.start()
    ready.wait()
    begin = time.perf_counter()
    for thread in pool:
        thread.join()
    return tiles // threads * threads * 2 * 2**20 / (time.perf_counter() - begin) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu")
    device = parser.parse_args().device
    if device == "cpu":
        cpu()
    else:
        gpu(device)


if __name__ == "__main__":
    main()
