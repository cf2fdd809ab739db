"""Weights per second of the kernels alone, from memory to memory: `python benchmarks/kernels.py [--device cuda]`.

On a CPU: one core, one tile [256, 4096]. On a GPU: the kernel by itself, on data that is on the device already, the time to
make a function usable there (compiled by LLVM or cached, then translated by the driver or cached), and the rate with the
copies from and to host memory, in tiles of 4 MiB on several threads. With `--check`, bytes are held against the CPU's.
"""

from __future__ import annotations

import argparse
import threading
import time
from collections.abc import Callable
from ctypes import c_float, c_int64, c_uint64
from dataclasses import replace

import numpy as np

from mfptq.calibration.feedback import feedback_statistics
from mfptq.calibration.methods import importance, local_hessian, shrinkage
from mfptq.kernels import QuantizeArgs, load_kernel
from mfptq.kernels.calibrated import (
    CALIBRATED_METHODS,
    FEEDBACK,
    FUNCTIONS,
    MAX_RANK,
    PreparedStatistics,
)

SHAPE = (256, 4096)
METHODS = ("search", "minmax", *CALIBRATED_METHODS)
DTYPES = {"BF16": "bf16", "F16": "float16", "F32": "float32"}


def args_of(method: str) -> QuantizeArgs:
    return QuantizeArgs(method, 2688 / 0.1 if method == "minmax" else 2.0**13)


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


def statistics(columns: int) -> dict[str, PreparedStatistics | None]:
    """Return what each method takes, of correlated inputs of very different sizes."""
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((256, columns)) * rng.lognormal(0, 1, columns)
    inputs[:, 1:] += 0.5 * inputs[:, :-1]
    blocks = inputs.reshape(len(inputs), -1, 16).transpose(1, 0, 2)
    hessian = (blocks.transpose(0, 2, 1) @ blocks / len(inputs)).astype(np.float32)
    moment = np.diagonal(hessian, axis1=1, axis2=2).reshape(-1)
    local = PreparedStatistics(local_hessian(hessian, 10_000))
    _, sizes, directions = np.linalg.svd(inputs / len(inputs) ** 0.5, full_matrices=False)
    factors = (sizes[:, None] * directions)[:MAX_RANK].astype(np.float32)
    feedback = PreparedStatistics(feedback_statistics(hessian, factors, 1 - shrinkage(10_000)))
    return {
        "weighted": PreparedStatistics(importance(moment)), "hessian": local, "hessian+": local, FEEDBACK: feedback,
    }  # fmt: skip


class Job:
    """One tile, again and again, by one method on one device."""

    def __init__(self, device: str, method: str, dtype: str, shape: tuple[int, int] = SHAPE) -> None:
        self.kernel = load_kernel(device)
        self.args = replace(args_of(method), statistics=statistics(shape[1]).get(method))
        values = tile(dtype, shape)
        self.data = self.kernel.allocate(values.nbytes).view(values.dtype).reshape(shape)
        self.data[:] = values
        self.packed = self.kernel.allocate(values.size // 2).reshape(shape[0], -1)
        self.scales = self.kernel.allocate(values.size // 16).reshape(shape[0], -1)

    def __call__(self) -> None:
        self.kernel.quantize(self.data, self.args, self.packed, self.scales)


def cpu(methods: list[str]) -> None:
    kernel = load_kernel("cpu")
    print(f"kernel {kernel.name}, million weights per second, one core, best of 30")
    for dtype in DTYPES.values():
        data = tile(dtype)
        rates = {method: data.size / best(Job("cpu", method, dtype)) / 1e6 for method in methods}
        rates["amax"] = data.size / best(lambda data=data: kernel.amax(data)) / 1e6
        print(f"{dtype:8}", "  ".join(f"{name} {rate:6.0f}" for name, rate in rates.items()))


def gpu(device: str, methods: list[str], *, check: bool) -> None:
    from mfptq.kernels.cuda import MAX_GRID, STATS_BYTES, THREADS, WARP, load_function
    from mfptq.kernels.driver import DeviceMemory, DeviceStream, open_device

    begin = time.perf_counter()
    opened = open_device(int(device.partition(":")[2] or 0))
    print(f"{opened.name}, opened in {time.perf_counter() - begin:.2f} s; billion weights per second on the device:")
    known, shape = statistics(4096), (16 * 1024, 4096)
    with opened:
        stream = DeviceStream(opened)
        for name, dtype in DTYPES.items():
            data = np.tile(tile(dtype, (1024, 4096)), (16, 1))
            blocks, width = data.size // 16, shape[1] // 16
            held = [DeviceMemory(opened, size) for size in (data.nbytes, 8 * blocks, blocks, STATS_BYTES, 2**22)]
            stream.upload(held[0].pointer, data)
            places = [c_uint64(each.pointer) for each in held]
            line = []
            for method in methods:
                begin = time.perf_counter()
                function = load_function(opened, f"{FUNCTIONS.get(method, method)}_{name}")
                ready = time.perf_counter() - begin
                arguments = [*places[:4], c_int64(blocks), c_float(args_of(method).global_scale)]
                if method in CALIBRATED_METHODS:
                    values = np.ascontiguousarray(known[method].values)
                    stream.upload(held[4].pointer, values)
                    stream.wait()
                    last = known[method].rank if method == FEEDBACK else 0
                    arguments[4:5] = [places[4], c_int64(blocks), c_int64(width), c_int64(last)]
                items, threads = (shape[0], WARP) if method == FEEDBACK else (blocks, THREADS)
                seconds = on_device(stream, function, (min(MAX_GRID, items // threads), threads), tuple(arguments))
                line.append(f"{method} {data.size / seconds / 1e9:.1f} (ready in {ready:.2f} s)")
            amax = load_function(opened, f"amax_{8 * data.itemsize}")
            seconds = on_device(stream, amax, (MAX_GRID, THREADS), (places[0], c_int64(data.nbytes // 4), places[3]))
            print(f"{dtype:8}", "  ".join(line), f" amax {data.size / seconds / 1e9:.1f}", flush=True)
            for memory in held:
                memory.free()
    for method in methods:
        rates = ", ".join(f"{streamed(device, method, threads):.1f} with {threads}" for threads in (1, 4, 8))
        print(f"{method} from host memory, by threads: {rates}", flush=True)
    for method in methods if check else ():
        for dtype in DTYPES.values():
            ours, theirs = Job(device, method, dtype, (1000, 4096)), Job("cpu", method, dtype, (1000, 4096))
            ours(), theirs()
            assert np.array_equal(ours.packed, theirs.packed), (method, dtype)
            assert np.array_equal(ours.scales, theirs.scales), (method, dtype)
    if check:
        print("the same bytes as the CPU's")


def on_device(stream, function: int, grid: tuple[int, int], arguments: tuple, launches: int = 20) -> float:
    """Return seconds of one launch: many are in flight, so that starting them does not count."""

    def run() -> None:
        for _ in range(launches):
            stream.launch(function, *grid, arguments)
        stream.wait()

    return best(run) / launches


def streamed(device: str, method: str, threads: int, tiles: int = 200) -> float:
    shared = Job(device, method, "bf16", (512, 4096))

    def work() -> None:
        job = Job.__new__(Job)
        job.__dict__.update(shared.__dict__)
        for name in ("data", "packed", "scales"):
            own = shared.kernel.allocate(getattr(shared, name).nbytes).view(getattr(shared, name).dtype)
            setattr(job, name, own.reshape(512, -1))
        job.data[:] = shared.data
        job()
        ready.wait()
        for _ in range(tiles // threads):
            job()

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
    parser.add_argument("--methods", nargs="*", default=METHODS, choices=METHODS)
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    if arguments.device == "cpu":
        cpu(arguments.methods)
    else:
        gpu(arguments.device, arguments.methods, check=arguments.check)


if __name__ == "__main__":
    main()
