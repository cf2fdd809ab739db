"""Compiled functions stay inside of their arrays: tests of what calls them, run once more with guarded memory."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SMALL = ["tests/encodings/test_smoothed.py", "tests/kernels/test_transposing.py"]
WHOLE = ["tests/encodings", "tests/smoothing", "tests/execution", "tests/calibration", "tests/test_conversion.py"]


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("tests", [SMALL, pytest.param(WHOLE, marks=pytest.mark.slow)], ids=["small", "whole"])
def test_compiled_functions_stay_inside_of_their_arrays(tests: list[str], tmp_path: Path) -> None:
    base = f"--basetemp={tmp_path / 'guarded'}"
    done = run_python("-m", "pytest", "-q", "-x", base, "-p", "no:cacheprovider", "-p", "tests.kernels.guarded", *tests)
    assert done.returncode == 0, done.stdout[-2000:]


def test_a_function_that_does_not_would_be_found() -> None:
    """Factors for one column, where there are sixteen: the function reads on behind them."""
    lines = [
        "import numpy, tests.kernels.guarded",
        "from mfptq.kernels.compiling import LONG, Array, CpuFunctions",
        "from mfptq.kernels.shift_code import emit",
        "values, shifts, result = (numpy.zeros(n, numpy.uint16) for n in (16, 1, 1))",
        "shift = CpuFunctions(emit, [Array, Array, *[LONG] * 3, Array])['shift_bf16']",
        "shift(values, shifts, 1, 16, 0, result)",
    ]
    assert run_python("-c", "\n".join(lines)).returncode == -signal.SIGSEGV
