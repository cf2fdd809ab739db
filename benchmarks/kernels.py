"""Weights per second of the kernels alone, from memory to memory: `python benchmarks/kernels.py [--device cuda]`.

On a CPU: one core, one tile [256, 4096]. On a GPU: the kernel by itself, on data that is on the device already, and with
the copies from and to host memory, in tiles of 4 MiB on several threads.
"""

from __future__ import annotations

import argparse
import threading
import time
from collections.abc import Callable
from ctypes import c_float, c_int64, c_uint64

import numpy as np

from mfptq.calibration.methods import importance, local_hessian
from mfptq.kernels import QuantizeArgs, load_kernel
from mfptq.kernels.calibrated import CALIBRATED_METHODS, PreparedStatistics, load_calibrated_kernel

SHAPE = (256, 4096)
RECIPES = (QuantizeArgs("search", 2.0**13), QuantizeArgs("minmax", 2688 / 0.1))


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
        found = PreparedStatistics(importance(moment) if method == "weighted" else local_hessian(hessian, 10_000))
        recipe = QuantizeArgs(method, 2.0**13)
        seconds = best(
            lambda found=found, recipe=recipe: kernel.quantize(data, recipe, found, packed=out[0], scales=out[1])
        )
        print(f"{'':8} {method} {data.size / seconds / 1e6:.0f}")


def gpu(device: str) -> None:
    from mfptq.kernels.cuda import ENTRIES, MAX_GRID, STATS_BYTES, THREADS
    from mfptq.kernels.driver import Memory, Stream, open_device
    from mfptq.kernels.ptx import compile_ptx

    kernel, opened = load_kernel(device), open_device(int(device.partition(":")[2] or 0))
    print(f"kernel {kernel.name}, billion weights per second, {opened.name}")
    with opened:
        functions, stream = opened.load(compile_ptx(), ENTRIES), Stream(opened)
        for dtype, kind in (("bf16", "bf16"), ("float16", "f16"), ("float32", "f32")):
            data = np.tile(tile(dtype, (1024, 4096)), (16, 1))
            blocks, words = data.size // 16, data.nbytes // 4
            source, packed, scales, stats = (
                Memory(opened, size) for size in (data.nbytes, 8 * blocks, blocks, STATS_BYTES)
            )
            stream.upload(source.pointer, data)
            places = [c_uint64(each.pointer) for each in (source, packed, scales, stats)]
            grid, line = min(MAX_GRID, blocks // THREADS), []
            for recipe in RECIPES:
                arguments = (*places, c_int64(blocks), c_float(recipe.global_scale))
                name = f"{recipe.method}_{kind}"
                line.append((recipe.method, on_device(stream, functions[name], grid, arguments)))
            found = (places[0], c_int64(words), places[3])
            line.append(("amax", on_device(stream, functions[f"amax_{8 * data.itemsize}"], grid, found)))
            print(f"{dtype:8}", "  ".join(f"{name} {data.size / seconds / 1e9:6.1f}" for name, seconds in line))
            for memory in (source, packed, scales, stats):
                memory.free()
    for recipe in RECIPES:
        rates = ", ".join(f"{streamed(kernel, recipe, threads):.1f} with {threads}" for threads in (1, 4, 8))
        print(f"{recipe.method} from host memory, by threads: {rates}")


def on_device(stream, function: int, grid: int, arguments: tuple, launches: int = 20) -> float:
    """Return seconds of one launch: many are in flight, so that starting them does not count."""

    def run() -> None:
        for _ in range(launches):
            stream.launch(function, grid, 256, arguments)
        stream.wait()

    return best(run) / launches


def streamed(kernel, recipe: QuantizeArgs, threads: int, tiles: int = 200) -> float:
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
